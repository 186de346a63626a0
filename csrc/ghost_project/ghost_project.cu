#include "ghost_project/ghost_project.cuh"

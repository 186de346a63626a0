#include "ghost_dot_lowrank/ghost_dot_lowrank.cuh"

#include "ghost_dot/ghost_dot.cuh"

#include "ghost_norm_sq/ghost_norm_sq.cuh"

#include "embedding_dot/embedding_dot.cuh"

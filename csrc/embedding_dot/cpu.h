// The ghost dot product of an embedding table on the CPU.
#pragma once

#include "common/isa.h"

namespace gsf {

// u[t, k] = g[t] . r[k, ids[t]]; every id is a row of r; r[k] lies r_step elements behind r[k - 1].
void embedding_dot(const int64_t* ids, const Matrix& g, const Matrix& r, int64_t directions, int64_t r_step, float* u,
                   int threads, Isa isa);

}  // namespace gsf

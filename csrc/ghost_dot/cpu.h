// The ghost dot product with dense directions on the CPU.
#pragma once

#include "common/isa.h"

namespace gsf {

// u[t, k] = sum_o g[t, o] (sum_i r[k, o, i] a[t, i]); r[k] lies r_step elements behind r[k - 1].
void ghost_dot(const Matrix& a, const Matrix& g, const Matrix& r, int64_t directions, int64_t r_step, float* u,
               int threads, Isa isa);

}  // namespace gsf

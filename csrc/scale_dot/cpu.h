// The ghost dot product of a scale or a bias on the CPU.
#pragma once

#include "common/isa.h"

namespace gsf {

// u[t, k] = sum_i g[t, i] x_hat[t, i] r[k, i]; x_hat may be null: a bias, x_hat = 1. r is [directions, d].
void scale_dot(const Matrix* x_hat, const Matrix& g, const Matrix& r, float* u, int threads, Isa isa);

}  // namespace gsf

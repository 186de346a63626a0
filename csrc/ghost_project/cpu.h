// The two-sided projection of per-example gradients on the CPU.
#pragma once

#include "common/isa.h"

namespace gsf {

// out[n, i, j] = sum_{t in n} (p_out[:, i] . g[t]) (p_in[:, j] . a[t]), out contiguous [examples, k_out, k_in]
void ghost_project(const Matrix& a, const Matrix& g, const Matrix& p_in, const Matrix& p_out, const int64_t* bounds,
                   int64_t examples, float* out, int threads, Isa isa);

}  // namespace gsf

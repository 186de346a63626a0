// The low-rank ghost dot product on the CPU, in its two halves.
#pragma once

#include "common/isa.h"

namespace gsf {

// z[t, j] = q[:, j] . a[t]; z is [tokens, ld] with ld >= ranks rounded up to 16 where `padded`, else ld = ranks.
void lowrank_project(const Matrix& a, const Matrix& q, float* z, int64_t ld, bool padded, int threads, Isa isa);

// u[t, k] = sum_j member[j, k] z[t, j] (p[:, j] . g[t]); member is contiguous [ranks, directions].
void lowrank_contract(const Matrix& z, const Matrix& g, const Matrix& p, const float* member, int64_t directions,
                      float* u, int threads, Isa isa);

}  // namespace gsf

// Inner products of per-example gradients given as factors, on the CPU.
#pragma once

#include "common/isa.h"

namespace gsf {

// One factor: a matrix [tokens, width], or ids [tokens] that stand for one-hot rows.
struct Factor {
  Matrix matrix;
  const int64_t* ids;  // null: the matrix
};

// Example n is the tokens spans[2 n] .. spans[2 n + 1] - 1.
// out[n] = sum_{t, u in n} (left1[t] . left2[u]) (right1[t] . right2[u]); `same`: the second pair is the first, then
// each unordered pair t, u is worked out once.
void ghost_inner(const Factor (&left)[2], const Factor (&right)[2], bool same, const int64_t* spans, int64_t examples,
                 float* out, int threads, Isa isa);

}  // namespace gsf

// Inner products of every example of one batch with every example of another, on the CPU.
#pragma once

#include "common/isa.h"

namespace gsf {

// A packed batch: example n owns the tokens bounds[n] .. bounds[n + 1] - 1 of a and g.
struct Batch {
  Matrix a, g;
  const int64_t* bounds;
  int64_t examples;
};

// out[n, m] = sum_{t in n of left, u in m of right} (a1[t] . a2[u]) (g1[t] . g2[u])
void ghost_gram(const Batch& left, const Batch& right, float* out, int threads, Isa isa);

}  // namespace gsf

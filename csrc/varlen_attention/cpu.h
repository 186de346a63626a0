// Causal attention over packed rows and its gradients, in bfloat16.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "varlen_attention/attention.h"

namespace gsf {

// The name of the instruction set that attention runs with, none above `isa`; null where none will do.
const char* attention_isa(Isa isa);

// Row n is the tokens [bounds[n], bounds[n + 1]). False where attention_isa gives null: nothing is written.
bool attention_forward(const attention::Problem& problem, const attention::Forward& to, const int64_t* bounds,
                       int64_t rows, int threads, Isa isa);
bool attention_backward(const attention::Problem& problem, const attention::Backward& with, const int64_t* bounds,
                        int64_t rows, int threads, Isa isa);

}  // namespace gsf

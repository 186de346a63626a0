// Which instruction set's kernels run.
#pragma once

#include "common/kernels.h"

namespace gsf {

// Instruction sets from the most portable to the most capable.
enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

// The most capable one that this processor and this operating system can run; worked out once.
Isa best_isa();

// The kernels of an instruction set, or of the most capable one that is not above it here.
const Kernels& kernels(Isa isa);

}  // namespace gsf

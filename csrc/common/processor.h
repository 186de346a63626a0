// What this processor and this operating system can run; worked out once.
#pragma once

namespace gsf {

// Instruction sets from the most portable to the most capable.
enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

// The most capable one.
Isa best_isa();

}  // namespace gsf

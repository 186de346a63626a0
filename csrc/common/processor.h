// What this processor and this operating system can run; worked out once.
#pragma once

namespace gsf {

// Instruction sets from the most portable to the most capable.
enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

// The most capable one.
Isa best_isa();

// Whether AVX-512 multiplies pairs of bfloat16 numbers, which processors with and without AMX may do.
bool has_bf16();

}  // namespace gsf

#include "common/processor.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gsf {
namespace {

#if defined(__x86_64__)
// The registers that the operating system saves on a context switch.
uint64_t enabled_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux hands out the 8 KB of tile registers only to a process that asks for them.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool bit(uint32_t word, int at) {
  return (word >> at & 1) != 0;
}

Isa detect() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::kPortable;
  const bool fma = bit(c, 12), f16c = bit(c, 29), os_saves = bit(c, 27);
  if (!os_saves || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return Isa::kPortable;
  const uint64_t state = enabled_state();
  const bool avx2 = bit(b, 5), avx512 = bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);
  const bool amx = bit(d, 24) && bit(d, 22);
  uint32_t more = 0;
  const bool bf16 = __get_cpuid_count(7, 1, &more, &b, &c, &d) && bit(more, 5);
  if (!(avx2 && fma && f16c && (state & 0x6) == 0x6)) return Isa::kPortable;
  if (!(avx512 && (state & 0xe6) == 0xe6)) return Isa::kAvx2;
  if (!bf16) return Isa::kAvx512;
  if (!(amx && (state & 0x60000) == 0x60000 && may_use_tiles())) return Isa::kAvx512Bf16;
  return Isa::kAmx;
}
#else
Isa detect() {
  return Isa::kPortable;
}
#endif

}  // namespace

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

}  // namespace gsf

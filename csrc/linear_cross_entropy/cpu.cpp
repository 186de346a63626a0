// What the fused head needs of the CPU and of the operating system.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "linear_cross_entropy/head.h"

namespace gradshield::head {
namespace {

constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA of Linux

bool has(uint32_t bits, int bit) {
  return (bits >> bit & 1) != 0;
}

Level look() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  // OSXSAVE, FMA and F16C, without which the rest cannot be asked for
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || !has(c, 27) || !has(c, 12) || !has(c, 29)) return Level::kNone;
  uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  // AVX-512 F, DQ, BW and VL, and an operating system that keeps their registers
  if ((low & 0xe6) != 0xe6 || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || !has(b, 16) || !has(b, 17) ||
      !has(b, 30) || !has(b, 31))
    return Level::kNone;
  const bool amx = has(d, 22) && has(d, 24);
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d) == 0 || !has(a, 5)) return Level::kAvx512;
  return amx && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? Level::kAmx : Level::kBf16;
}

}  // namespace

Level level() {
  static const Level answer = look();
  return answer;
}

}  // namespace gradshield::head

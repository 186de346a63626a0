// What the fused head needs of the CPU and of the operating system.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "csrc/linear_cross_entropy/head.h"

namespace gradshield::head {
namespace {

constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA of Linux

bool has(uint32_t bits, int bit) {
  return (bits >> bit & 1) != 0;
}

const char* look() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || !has(c, 27) || !has(c, 12) || !has(c, 29)) return "AVX2 with FMA and F16C";
  uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & 0xe6) != 0xe6 || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || !has(b, 16) || !has(b, 17) ||
      !has(b, 30) || !has(b, 31))
    return "AVX-512 (F, BW, DQ, VL)";
  if (!has(d, 22) || !has(d, 24)) return "AMX-BF16";
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return "the system's leave to use AMX tiles";
  return "";
}

}  // namespace

const char* missing() {
  static const char* const answer = look();
  return answer;
}

}  // namespace gradshield::head

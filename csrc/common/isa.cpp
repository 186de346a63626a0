#include "common/isa.h"

namespace gsf {

// The build defines GSF_<NAME> for each instruction set that the compiler knows.
const Kernels& kernels(Isa isa) {
  const Isa limit = isa < best_isa() ? isa : best_isa();
#if defined(GSF_AMX)
  if (limit >= Isa::kAmx) return kAmx;
#endif
#if defined(GSF_AVX512_BF16)
  if (limit >= Isa::kAvx512Bf16) return kAvx512Bf16;
#endif
#if defined(GSF_AVX512)
  if (limit >= Isa::kAvx512) return kAvx512;
#endif
#if defined(GSF_AVX2)
  if (limit >= Isa::kAvx2) return kAvx2;
#endif
  (void)limit;
  return kPortable;
}

}  // namespace gsf

// The fused head's kernel for plain AVX-512. Library headers come before the target, so that no code of theirs is
// compiled for it.
#include <immintrin.h>

#include <initializer_list>

#include "linear_cross_entropy/head.h"

#define GRADSHIELD_UNIT 0
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")

#include "linear_cross_entropy/item.h"

namespace gsf::head {

const Kernel kAvx512Kernel = kThisKernel;

}  // namespace gsf::head

// The kernels for AVX-512 with products of bfloat16 pairs and no matrix unit; see setup_native.py for this file's
// flags.
#define GSF_ISA avx512_bf16
#include "common/grams.h"
#include "common/pairs.h"
#include "common/rows.h"

namespace gsf {

const Kernels kAvx512Bf16 = {
    "avx512_bf16",
    avx512_bf16::kRows,
    1,
    avx512_bf16::product_or_pairs,
    avx512_bf16::pack,
    avx512_bf16::split,
    avx512_bf16::combine,
    avx512_bf16::row_dots,
    avx512_bf16::dot,
    avx512_bf16::scale_dots,
    avx512_bf16::outer,
    avx512_bf16::gram,
};

}  // namespace gsf

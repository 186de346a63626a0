// Attention's kernels for AVX-512 with BF16 and no matrix unit; see setup_native.py for this file's flags.
#define GSF_ISA avx512_bf16_attention
#include "varlen_attention/backward.h"
#include "varlen_attention/forward.h"

namespace gsf::attention {

const Kernels kAvx512Bf16 = {
    "avx512_bf16",
    avx512_bf16_attention::forward_bytes,
    avx512_bf16_attention::forward,
    avx512_bf16_attention::backward_bytes,
    avx512_bf16_attention::backward,
};

}  // namespace gsf::attention

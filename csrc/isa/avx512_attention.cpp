// Attention's kernels for AVX-512 F, BW, VL, DQ; see setup_native.py for this file's flags.
#define GSF_ISA avx512_attention
#include "varlen_attention/backward.h"
#include "varlen_attention/forward.h"

namespace gsf::attention {

const Kernels kAvx512 = {
    "avx512",
    avx512_attention::forward_bytes,
    avx512_attention::forward,
    avx512_attention::backward_bytes,
    avx512_attention::backward,
};

}  // namespace gsf::attention

// Attention's kernels for AMX with bfloat16 tiles; see setup_native.py for this file's flags.
#define GSF_ISA amx_attention
#include "varlen_attention/backward.h"
#include "varlen_attention/forward.h"

namespace gsf::attention {

const Kernels kAmx = {
    "amx", amx_attention::forward_bytes, amx_attention::forward, amx_attention::backward_bytes, amx_attention::backward,
};

}  // namespace gsf::attention

// The kernels for AVX-512 F, BW, VL, DQ; see setup_native.py for this file's flags.
#define GSF_ISA avx512
#include "common/product.h"
#include "common/rows.h"

namespace gsf {

const Kernels kAvx512 = {
    "avx512",        avx512::kRows,    0,           avx512::product,    avx512::pack,  nullptr,
    avx512::combine, avx512::row_dots, avx512::dot, avx512::scale_dots, avx512::outer,
};

}  // namespace gsf

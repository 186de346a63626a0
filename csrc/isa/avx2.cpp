// The kernels for AVX2 with FMA and F16C; see setup_native.py for this file's flags.
#define GSF_ISA avx2
#include "common/product.h"
#include "common/rows.h"

namespace gsf {

const Kernels kAvx2 = {
    "avx2",        avx2::kRows,    0,         avx2::product,    avx2::pack,  nullptr,
    avx2::combine, avx2::row_dots, avx2::dot, avx2::scale_dots, avx2::outer,
};

}  // namespace gsf

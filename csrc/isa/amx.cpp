// The kernels for AMX with bfloat16 tiles on top of AVX-512; see setup_native.py for this file's flags.
#define GSF_ISA amx
#include "common/amx.h"

#include "common/product.h"
#include "common/rows.h"

namespace gsf {

const Kernels kAmx = {
    "amx",        amx::kRows,    3,        amx::product_or_tiles, amx::pack,  amx::split,
    amx::combine, amx::row_dots, amx::dot, amx::scale_dots,       amx::outer,
};

}  // namespace gsf

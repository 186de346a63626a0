// The kernels for any processor; see setup_native.py for this file's flags.
#define GSF_ISA portable
#include "common/product.h"
#include "common/rows.h"

namespace gsf {

const Kernels kPortable = {
    "portable",           portable::kRows,    0,
    portable::product,    portable::pack,     nullptr,
    portable::combine,    portable::row_dots, portable::dot,
    portable::scale_dots, portable::outer,
};

}  // namespace gsf

// Which instruction set's kernels run.
#pragma once

#include "common/kernels.h"
#include "common/processor.h"

namespace gsf {

// The kernels of an instruction set, or of the most capable one that is not above it here.
const Kernels& kernels(Isa isa);

}  // namespace gsf

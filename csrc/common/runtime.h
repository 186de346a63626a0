// The host half of CUDA that launchers and their callers share: error codes and streams.
#pragma once

#if defined(GRADSHIELD_EMULATOR)
#include "emulator/device.h"
#else
#include <cuda_runtime_api.h>
#endif

#include <cstdint>

namespace gradshield {

enum Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2, kInt64 = 3, kInt32 = 4 };

}  // namespace gradshield

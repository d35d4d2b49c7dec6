// What launchers use of the CUDA device, implemented by device.cpp.
#pragma once
#include <cuda_runtime_api.h>

#include "ops/backend.h"

namespace p2r::cuda {

cudaStream_t stream_of(Device& device);
int multiprocessors(Device& device);

}  // namespace p2r::cuda

// The CUDA device as its launchers and its runtime (device.cpp) both see it.
#pragma once
#include <cuda_runtime_api.h>

#include "ops/backend.h"

namespace p2r::cuda {

// Of the device that an operation was called on.
cudaStream_t stream_of(Device& device);
int multiprocessors(Device& device);

}  // namespace p2r::cuda

// The kernels from which an operation can choose on a device.
#pragma once
#include <vector>

#include "ops/backend.h"

namespace p2r {

struct KernelChoice {
  const char *op, *backend;
  const char* capability;  // CUDA: of the only chips that it runs on, or "" if it runs on all
  const char* name;
  bool (*takes)(DType dtype, int64_t head_dim);  // the inputs that it can run
};

// The default first: it is the first that takes the input. Empty for an operation that has no
// choice.
std::vector<KernelChoice> kernel_choices(const std::string& op, const DeviceInfo& device);

}  // namespace p2r

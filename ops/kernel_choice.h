// The kernels among which an operation can choose on a device, by name: the `kernel` option of
// attention, and Device.kernels().
#pragma once
#include <vector>

#include "ops/backend.h"

namespace p2r {

struct KernelChoice {
  const char *op, *backend;
  const char* capability;  // CUDA: the only compute capability it runs on, "" for any
  const char* name;
  bool any_keys;  // whether it takes all of AttentionKeys (ops/attention.h), and grouped heads
  bool (*supports)(DType dtype, int64_t head_dim);
  // Whether it is a good choice for sequences of these lengths, if it supports the input.
  bool (*suits)(const Ints& cu_seqlens);
};

// In order of preference: the default is the first that supports and suits the input. Empty for an
// operation with a single kernel.
std::vector<KernelChoice> kernel_choices(const std::string& op, const DeviceInfo& device);

}  // namespace p2r

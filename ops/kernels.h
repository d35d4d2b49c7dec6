// The kernels from which an operation can choose on a device, by name, the default first.
#pragma once
#include <string>
#include <vector>

#include "ops/backend.h"

namespace p2r {

// Empty for an operation that has no such choice.
std::vector<std::string> kernel_names(const std::string& op, const DeviceInfo& device);

}  // namespace p2r

#include "ops/kernels.h"

namespace p2r {

namespace {

bool any(DType, int64_t) { return true; }

// Each device's in the order of preference.
constexpr KernelChoice kChoices[] = {
    {"attention", "cpu", "", "tiled", any},
    {"attention", "cuda", "", "plain", any},
};

}  // namespace

std::vector<KernelChoice> kernel_choices(const std::string& op, const DeviceInfo& device) {
  std::vector<KernelChoice> found;
  for (const KernelChoice& c : kChoices)
    if (op == c.op && device.backend == c.backend &&
        (!*c.capability || device.capability == c.capability))
      found.push_back(c);
  return found;
}

}  // namespace p2r

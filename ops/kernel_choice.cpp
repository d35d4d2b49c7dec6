#include "ops/kernel_choice.h"

namespace p2r {

namespace {

bool any(DType, int64_t) { return true; }
bool halves(DType dtype, int64_t) { return dtype != DType::f32; }

bool hopper(DType dtype, int64_t head_dim) {
  return dtype != DType::f32 &&
         (head_dim == 64 || head_dim == 72 || head_dim == 80 || head_dim == 128);
}

// In order of preference within each device.
constexpr KernelChoice kChoices[] = {
    {"attention", "cpu", "", "tiled", any},
    {"attention", "cuda", "9.0", "wgmma", hopper},
    {"attention", "cuda", "", "mma", halves},
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

#include "ops/kernels.h"

namespace p2r {

namespace {

struct Choice {
  const char *op, *backend;
  std::vector<std::string> names;
};

}  // namespace

std::vector<std::string> kernel_names(const std::string& op, const DeviceInfo& device) {
  static const Choice choices[] = {
      {"attention", "cpu", {"tiled"}},
      {"attention", "cuda", {"plain"}},
  };
  for (const Choice& c : choices)
    if (op == c.op && device.backend == c.backend) return c.names;
  return {};
}

}  // namespace p2r

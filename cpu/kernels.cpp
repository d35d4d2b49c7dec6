// The CPU backend's table.
#include "cpu/device.h"

namespace p2r::cpu {

#define OP(family, function, Args) void function(const Args&, Device&);
#include "ops/ops.def"
#undef OP

const Kernels& CpuDevice::kernels() const {
  static const Kernels table = {
#define OP(family, function, Args) &function,
#include "ops/ops.def"
#undef OP
  };
  return table;
}

}  // namespace p2r::cpu

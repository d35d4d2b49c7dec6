// Sums and products with broadcasting: threads take runs of the result, along which each operand is
// contiguous or a single element.
#include "ops/elementwise.h"

#include <algorithm>

#include "cpu/device.h"
#include "cpu/simd/arguments.h"

namespace p2r::cpu {

namespace {

constexpr int64_t kGrain = 32768;  // elements of one task

void combine(Arithmetic operation, const View& x, const View& y, const View& out, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const BroadcastAxes axes(x.shape, y.shape, out.shape);
  cpu.launch(out.size(), kGrain, [=, &simd = cpu.simd()](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end;) {
      int64_t rest = i, at_x = 0, at_y = 0;
      for (int k = 0; k < axes.rank; ++k) {
        const int64_t place = rest % axes.size[k];
        rest /= axes.size[k];
        at_x += place * axes.x[k];
        at_y += place * axes.y[k];
      }
      const int64_t n = std::min(end - i, axes.size[0] - i % axes.size[0]);
      simd.elementwise(operation, out.dtype, x.element(at_x), axes.x[0] == 0, y.element(at_y),
                       axes.y[0] == 0, out.element(i), n);
      i += n;
    }
  });
}

}  // namespace

void add(const AddArgs& a, Device& device) { combine(Arithmetic::add, a.x, a.y, a.out, device); }
void mul(const MulArgs& a, Device& device) { combine(Arithmetic::mul, a.x, a.y, a.out, device); }

}  // namespace p2r::cpu

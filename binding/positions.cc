#include "ops/positions.h"

#include <cmath>

#include "binding/grid.h"

namespace p2r::binding {

Napi::Value vision_positions(Call& call) {
  VisionPositionsArgs a;
  a.table = call.in("table", kFloats, 2);
  a.grid_thw = call.ints("gridThw", 0, INT32_MAX);
  a.merge = call.integer("mergeSize", 1, INT32_MAX);
  a.side = static_cast<int64_t>(std::llround(std::sqrt(static_cast<double>(a.table.shape[0]))));
  call.check(a.side > 0 && a.side <= 46340 && a.side * a.side == a.table.shape[0], Code::shape,
             "table must have a square number of rows, got " + to_string(a.table.shape));
  const int64_t tokens = tokens_of_grids(call, a.grid_thw, a.merge);
  a.out = call.result(a.table.dtype, {tokens, a.table.shape[1]});
  return call.run(&Kernels::vision_positions, a);
}

}  // namespace p2r::binding

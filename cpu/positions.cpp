// Position embeddings of patches: four rows of the table, blended with their bilinear weights.
#include "ops/positions.h"

#include <algorithm>

#include "cpu/device.h"

namespace p2r::cpu {

void vision_positions(const VisionPositionsArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t c = a.out.shape[1];
  if (!c) return;
  std::vector<PatchGrid> grids = patch_grids(a.grid_thw);
  AxisSamples axes = axis_samples(grids, a.side);
  const int64_t grain = std::max<int64_t>(1, 16384 / c);
  cpu.launch(a.out.shape[0], grain,
             [=, grids = std::move(grids), axes = std::move(axes), &simd = cpu.simd()](
                 int64_t begin, int64_t end, int) {
               const auto corner = [&](int32_t y, int32_t x) -> const void* {
                 return a.table.element((y * a.side + x) * c);
               };
               for (int64_t token = begin; token < end; ++token) {
                 const int g = grid_of(grids.data(), static_cast<int>(grids.size()), token);
                 const PatchPlace at = place_of(grids[g], token, static_cast<int32_t>(a.merge));
                 const AxisSample y = axes.samples[axes.starts[g].rows + at.row];
                 const AxisSample x = axes.samples[axes.starts[g].columns + at.column];
                 const void* rows[4] = {corner(y.low, x.low), corner(y.low, x.high),
                                        corner(y.high, x.low), corner(y.high, x.high)};
                 const float weights[4] = {(1 - y.weight) * (1 - x.weight),
                                           (1 - y.weight) * x.weight, y.weight * (1 - x.weight),
                                           y.weight * x.weight};
                 simd.blend_rows(a.table.dtype, rows, weights, c, a.out.element(token * c));
               }
             });
}

}  // namespace p2r::cpu

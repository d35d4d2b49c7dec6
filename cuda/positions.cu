// Position embeddings: a grid-stride loop over the elements of the result. The table (5 MB in the
// 8B tower) stays in L2, so the cost is one write of the result.
#include "cuda/launch.cuh"
#include "cuda/workspace.h"
#include "ops/positions.h"

namespace p2r::cuda {

namespace {

constexpr int kBlock = 256;

template <class T>
__global__ void __launch_bounds__(kBlock)
    vision_positions_kernel(const T* table, const PatchGrid* grids, int count,
                            const AxisSample* samples, const AxisStart* starts, int side, int merge,
                            T* out, int64_t tokens, int64_t c) {
  for (int64_t i = blockIdx.x * int64_t{kBlock} + threadIdx.x; i < tokens * c;
       i += int64_t{gridDim.x} * kBlock) {
    const int64_t token = i / c, channel = i % c;
    const int g = grid_of(grids, count, token);
    const PatchPlace at = place_of(grids[g], token, merge);
    const AxisSample y = samples[starts[g].rows + at.row];
    const AxisSample x = samples[starts[g].columns + at.column];
    const auto corner = [&](int row, int column) {
      return to_float(table[(int64_t{row} * side + column) * c + channel]);
    };
    const float above = corner(y.low, x.low) * ((1 - y.weight) * (1 - x.weight)) +
                        corner(y.low, x.high) * ((1 - y.weight) * x.weight);
    out[i] = from_float<T>(above + corner(y.high, x.low) * (y.weight * (1 - x.weight)) +
                           corner(y.high, x.high) * (y.weight * x.weight));
  }
}

}  // namespace

void vision_positions(const VisionPositionsArgs& a, Device& device) {
  const int64_t tokens = a.out.shape[0], c = a.out.shape[1];
  if (!tokens || !c) return;
  const std::vector<PatchGrid> grids = patch_grids(a.grid_thw);
  const AxisSamples axes = axis_samples(grids, a.side);
  const PatchGrid* device_grids = nullptr;
  const AxisSample* samples = nullptr;
  const AxisStart* starts = nullptr;
  const ScratchWorkspace scratch(device, [&](Workspace& workspace) {
    device_grids = upload(device, workspace, grids);
    samples = upload(device, workspace, axes.samples);
    starts = upload(device, workspace, axes.starts);
  });
  with_float_type(a.table.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    launch(vision_positions_kernel<T>, blocks_for(tokens * c, kBlock), kBlock, 0, stream_of(device),
           a.table.as<const T>(), device_grids, static_cast<int>(grids.size()), samples, starts,
           static_cast<int>(a.side), static_cast<int>(a.merge), a.out.as<T>(), tokens, c);
  });
}

}  // namespace p2r::cuda

// Rotary embedding and its tables: one entry a thread and step of a grid-stride loop; both are
// bound by memory. The entry that is rotated with another is half a row away, in the same cache
// lines.
#include "cuda/rotary.cuh"
#include "cuda/workspace.h"
#include "ops/grid.h"
#include "ops/rotary.h"

namespace p2r::cuda {

namespace {

constexpr int kBlock = 256;

template <class T>
__global__ void __launch_bounds__(kBlock)
    rotate_kernel(const T* x, int64_t x_row, const float* cos, const float* sin, T* out,
                  int64_t out_row, int64_t tokens, int64_t width, int d, bool inverse) {
  for (int64_t i = blockIdx.x * int64_t{kBlock} + threadIdx.x; i < tokens * width;
       i += int64_t{gridDim.x} * kBlock) {
    const int64_t token = i / width, at = i % width;
    const int c = static_cast<int>(at % d);
    const T* row = x + token * x_row + (at - c);
    const auto entry = [row](int j) { return to_float(row[j]); };
    out[token * out_row + at] =
        from_float<T>(rotate_half(entry, cos + token * d, sin + token * d, c, d / 2, inverse));
  }
}

__global__ void __launch_bounds__(kBlock)
    vision_rotary_kernel(const PatchGrid* grids, int count, const float* frequencies, int merge,
                         int d, int64_t tokens, float* cos, float* sin) {
  for (int64_t i = blockIdx.x * int64_t{kBlock} + threadIdx.x; i < tokens * d;
       i += int64_t{gridDim.x} * kBlock) {
    const int64_t token = i / d;
    const int c = static_cast<int>(i % d) % (d / 2);
    const PatchPlace at = place_of(grids[grid_of(grids, count, token)], token, merge);
    const bool is_row = c < d / 4;
    const int32_t position = is_row ? at.row : at.column;
    const float angle = static_cast<float>(position) * frequencies[is_row ? c : c - d / 4];
    cos[i] = cosf(angle);
    sin[i] = sinf(angle);
  }
}

__global__ void __launch_bounds__(kBlock)
    mrope_tables_kernel(const int64_t* positions, const float* frequencies, MropeAxes axes,
                        int half, int64_t tokens, float* cos, float* sin) {
  for (int64_t i = blockIdx.x * int64_t{kBlock} + threadIdx.x; i < tokens * half;
       i += int64_t{gridDim.x} * kBlock) {
    const int64_t token = i / half, c = i % half, at = token * 2 * half + c;
    const float angle = static_cast<float>(positions[axes.of(c) * tokens + token]) * frequencies[c];
    cos[at] = cos[at + half] = cosf(angle);
    sin[at] = sin[at + half] = sinf(angle);
  }
}

}  // namespace

template <class T>
void rotate_rows(const T* x, int64_t x_row, const float* cos, const float* sin, T* out,
                 int64_t out_row, int64_t tokens, int64_t heads, int64_t d, bool inverse,
                 Device& device) {
  const int64_t n = tokens * heads * d;
  if (!n) return;
  launch(rotate_kernel<T>, blocks_for(n, kBlock), kBlock, 0, stream_of(device), x, x_row, cos, sin,
         out, out_row, tokens, heads * d, static_cast<int>(d), inverse);
}
template void rotate_rows(const float*, int64_t, const float*, const float*, float*, int64_t,
                          int64_t, int64_t, int64_t, bool, Device&);
template void rotate_rows(const __half*, int64_t, const float*, const float*, __half*, int64_t,
                          int64_t, int64_t, int64_t, bool, Device&);
template void rotate_rows(const __nv_bfloat16*, int64_t, const float*, const float*, __nv_bfloat16*,
                          int64_t, int64_t, int64_t, int64_t, bool, Device&);

void apply_rotary(const ApplyRotaryArgs& a, Device& device) {
  with_float_type(a.x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const int64_t row = a.x.shape[1] * a.x.shape[2];
    rotate_rows<T>(a.x.as<const T>(), row, a.cos.as<const float>(), a.sin.as<const float>(),
                   a.out.as<T>(), row, a.x.shape[0], a.x.shape[1], a.x.shape[2], a.inverse, device);
  });
}

void vision_rotary(const VisionRotaryArgs& a, Device& device) {
  const int64_t tokens = a.cos.shape[0], d = a.cos.shape[1];
  if (!tokens) return;
  const std::vector<PatchGrid> grids = patch_grids(a.grid_thw);
  const std::vector<float> frequencies = rotary_frequencies(a.theta, d / 2);
  const Scratch grid_memory = device.scratch(grids.size() * sizeof grids[0]);
  const Scratch frequency_memory = device.scratch(frequencies.size() * sizeof(float));
  device.upload(grid_memory.as<void>(), grids.data(), grids.size() * sizeof grids[0]);
  device.upload(frequency_memory.as<void>(), frequencies.data(),
                frequencies.size() * sizeof(float));
  launch(vision_rotary_kernel, blocks_for(tokens * d, kBlock), kBlock, 0, stream_of(device),
         grid_memory.as<const PatchGrid>(), static_cast<int>(grids.size()),
         frequency_memory.as<const float>(), static_cast<int>(a.merge), static_cast<int>(d), tokens,
         a.cos.as<float>(), a.sin.as<float>());
}

void mrope_tables(const MropeTablesArgs& a, Device& device) {
  const int64_t tokens = a.cos.shape[0], d = a.cos.shape[1];
  if (!tokens) return;
  const int64_t* positions = nullptr;
  const float* frequencies = nullptr;
  const ScratchWorkspace scratch(device, [&](Workspace& workspace) {
    positions = upload(device, workspace, a.positions);
    frequencies = upload(device, workspace, rotary_frequencies(a.theta, d));
  });
  launch(mrope_tables_kernel, blocks_for(tokens * d / 2, kBlock), kBlock, 0, stream_of(device),
         positions, frequencies, MropeAxes(a.sections), static_cast<int>(d / 2), tokens,
         a.cos.as<float>(), a.sin.as<float>());
}

}  // namespace p2r::cuda

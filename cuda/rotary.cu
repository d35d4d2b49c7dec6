// Rotary embedding and its tables, bound by memory. The rotation: a thread takes vectors of up to
// 16 bytes from the same place in both halves of a head, so that every entry is loaded once, and
// what is rotated in place is read before it is written; the tables' rows come from L1 for all
// heads but the first. A block takes a few tokens at a time, so that indices within them have 32
// bits.
#include "cuda/elementwise.cuh"
#include "cuda/rotary.cuh"
#include "cuda/workspace.h"
#include "ops/grid.h"
#include "ops/rotary.h"

namespace p2r::cuda {

namespace {

constexpr int kBlock = 256;

constexpr int kTokens = 8;  // that a block takes at a time

// N divides half a head.
template <class T, int N>
__global__ void __launch_bounds__(kBlock)
    rotate_kernel(const T* x, int64_t x_row, const float* cos, const float* sin, T* out,
                  int64_t out_row, int64_t tokens, int heads, int d, bool inverse) {
  const int half = d / 2, vectors = half / N;
  for (int64_t first = int64_t{blockIdx.x} * kTokens; first < tokens;
       first += int64_t{gridDim.x} * kTokens) {
    const int count = static_cast<int>(tokens - first < kTokens ? tokens - first : kTokens);
    for (int i = static_cast<int>(threadIdx.x); i < count * heads * vectors; i += kBlock) {
      const int row = i / vectors, c = i % vectors * N;  // row: token and head
      const int64_t token = first + row / heads;
      const int64_t at = row % heads * d + c;
      const Vector<T, N> low = Vector<T, N>::load(x + token * x_row + at),
                         high = Vector<T, N>::load(x + token * x_row + at + half);
      const Vector<float, N> cos_low = Vector<float, N>::load(cos + token * d + c),
                             cos_high = Vector<float, N>::load(cos + token * d + c + half),
                             sin_low = Vector<float, N>::load(sin + token * d + c),
                             sin_high = Vector<float, N>::load(sin + token * d + c + half);
      Vector<T, N> rotated_low, rotated_high;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float a = to_float(low.v[j]), b = to_float(high.v[j]);
        rotated_low.v[j] = from_float<T>(inverse ? cos_low.v[j] * a + sin_high.v[j] * b
                                                 : cos_low.v[j] * a - sin_low.v[j] * b);
        rotated_high.v[j] = from_float<T>(inverse ? cos_high.v[j] * b - sin_low.v[j] * a
                                                  : cos_high.v[j] * b + sin_high.v[j] * a);
      }
      rotated_low.store(out + token * out_row + at);
      rotated_high.store(out + token * out_row + at + half);
    }
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
  if (tokens * heads * d == 0) return;
  const auto run = [&](auto width) {
    launch(rotate_kernel<T, decltype(width)::value>, blocks_for(tokens, kTokens), kBlock, 0,
           stream_of(device), x, x_row, cos, sin, out, out_row, tokens, static_cast<int>(heads),
           static_cast<int>(d), inverse);
  };
  // 4 entries of 16 bits, for half heads of 36 entries and the like, are vectors of 8 bytes.
  constexpr int kWide = kVectorWidth<T>, kNarrow = 4;
  const auto fits = [&](int n) {
    return begin_at_16_bytes(x, cos, sin, out) && d / 2 % n == 0 && x_row % n == 0 &&
           out_row % n == 0;
  };
  if (kWide > kNarrow && fits(kWide))
    run(std::integral_constant<int, kWide>());
  else if (fits(kNarrow))
    run(std::integral_constant<int, kNarrow>());
  else
    run(std::integral_constant<int, 1>());
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

// Rows. Copies are grid-stride loops, one element or one aligned word of a row a thread. Sums: a
// block takes 32 columns of one segment; its 16 warps take the rows in turn and their sums are
// added in order.
#include "cuda/launch.cuh"
#include "cuda/workspace.h"
#include "ops/rows.h"

namespace p2r::cuda {

namespace {

constexpr int kBlock = 256;
constexpr int kSumBlock = 512, kSumRows = kSumBlock / 32;

template <class T>
__global__ void __launch_bounds__(kBlock)
    add_kernel(const T* x, const T* y, T* out, int64_t n, int64_t period) {
  for (int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * kBlock)
    out[i] = from_float<T>(to_float(x[i]) + to_float(y[i % period]));
}

template <class Word>
__global__ void __launch_bounds__(kBlock)
    gather_kernel(const Word* x, const int64_t* index, Word* out, int64_t n, int64_t words) {
  for (int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x; i < n * words;
       i += int64_t{gridDim.x} * kBlock)
    out[i] = x[index[i / words] * words + i % words];
}

// out[s] = the sum of rows offsets[s] .. offsets[s + 1] - 1 (of list[those] unless list is null),
// divided by their number for a mean.
template <class T>
__global__ void __launch_bounds__(kSumBlock)
    sum_segments_kernel(const T* x, const int64_t* offsets, const int64_t* list, T* out,
                        int64_t tasks, int64_t blocks, int64_t c, bool mean) {
  SMEM_ARRAY(float, sums, kSumBlock);
  const int lane = static_cast<int>(threadIdx.x) % 32, group = static_cast<int>(threadIdx.x) / 32;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t s = task / blocks, column = task % blocks * 32 + lane;
    const int64_t first = offsets[s], last = offsets[s + 1];
    float total = 0, run = 0;
    if (column < c) {
      int64_t added = 0;
      for (int64_t k = first + group; k < last; k += kSumRows) {
        run += to_float(x[(list ? list[k] : k) * c + column]);
        if (++added % kSumRun == 0) {
          total += run;
          run = 0;
        }
      }
    }
    sums[threadIdx.x] = total + run;
    __syncthreads();
    if (group == 0 && column < c) {
      float sum = 0;
      for (int i = 0; i < kSumRows; ++i) sum += sums[i * 32 + lane];
      if (mean && last > first) sum /= static_cast<float>(last - first);
      out[s * c + column] = from_float<T>(sum);
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    mean_pool_backward_kernel(const T* d_out, const int64_t* cu_seqlens, T* d_x, int64_t sequences,
                              int64_t n, int64_t c) {
  for (int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * kBlock) {
    const int64_t token = i / c;
    // Binary search for the last sequence that starts at or before the token, which skips empty
    // ones.
    int64_t low = 0, high = sequences;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (cu_seqlens[middle] <= token ? low : high) = middle;
    }
    const float length = static_cast<float>(cu_seqlens[low + 1] - cu_seqlens[low]);
    d_x[i] = from_float<T>(to_float(d_out[low * c + i % c]) / length);
  }
}

template <class Word>
void gather(const GatherRowsArgs& a, const int64_t* index, int64_t bytes, Device& device) {
  const int64_t n = a.out.shape[0], words = bytes / static_cast<int64_t>(sizeof(Word));
  launch(gather_kernel<Word>, blocks_for(n * words, kBlock), kBlock, 0, stream_of(device),
         a.x.as<const Word>(), index, a.out.as<Word>(), n, words);
}

void sum_segments(const View& x, const Ints& offsets, const Ints& list, bool mean, const View& out,
                  Device& device) {
  const int64_t c = row_size(out.shape), blocks = ceil_div(c, 32), tasks = out.shape[0] * blocks;
  if (!tasks) return;
  const int64_t *bounds = nullptr, *rows = nullptr;
  const ScratchWorkspace scratch(device, [&](Workspace& workspace) {
    bounds = upload(device, workspace, offsets);
    rows = list.empty() ? nullptr : upload(device, workspace, list);
  });
  with_float_type(x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    launch(sum_segments_kernel<T>, blocks_for(tasks, 1), kSumBlock, 0, stream_of(device),
           x.as<const T>(), bounds, rows, out.as<T>(), tasks, blocks, c, mean);
  });
}

}  // namespace

void add(const AddArgs& a, Device& device) {
  const int64_t n = a.x.size();
  if (!n) return;
  with_float_type(a.x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    launch(add_kernel<T>, blocks_for(n, kBlock), kBlock, 0, stream_of(device), a.x.as<const T>(),
           a.y.as<const T>(), a.out.as<T>(), n, a.y.size());
  });
}

void gather_rows(const GatherRowsArgs& a, Device& device) {
  const int64_t bytes = row_size(a.out.shape) * static_cast<int64_t>(size_of(a.x.dtype));
  if (!bytes || a.index.empty()) return;
  const int64_t* index = nullptr;
  const ScratchWorkspace scratch(
      device, [&](Workspace& workspace) { index = upload(device, workspace, a.index); });
  // The largest word that divides a row and to which the tensors are aligned, which may be views
  // into larger ones.
  const uint64_t alignment = static_cast<uint64_t>(bytes) | reinterpret_cast<uintptr_t>(a.x.data) |
                             reinterpret_cast<uintptr_t>(a.out.data);
  if (alignment % 16 == 0)
    gather<uint4>(a, index, bytes, device);
  else if (alignment % 4 == 0)
    gather<uint32_t>(a, index, bytes, device);
  else if (alignment % 2 == 0)
    gather<uint16_t>(a, index, bytes, device);
  else
    gather<uint8_t>(a, index, bytes, device);
}

void gather_rows_backward(const GatherRowsBackwardArgs& a, Device& device) {
  if (!a.d_x.size()) return;
  const Inverse inverse = invert(a.index, a.d_x.shape[0]);
  sum_segments(a.d_out, inverse.offsets, inverse.list, false, a.d_x, device);
}

void mean_pool(const MeanPoolArgs& a, Device& device) {
  sum_segments(a.x, a.cu_seqlens, {}, true, a.out, device);
}

void mean_pool_backward(const MeanPoolBackwardArgs& a, Device& device) {
  const int64_t n = a.d_x.size();
  if (!n) return;
  const int64_t* bounds = nullptr;
  const ScratchWorkspace scratch(
      device, [&](Workspace& workspace) { bounds = upload(device, workspace, a.cu_seqlens); });
  with_float_type(a.d_x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    launch(mean_pool_backward_kernel<T>, blocks_for(n, kBlock), kBlock, 0, stream_of(device),
           a.d_out.as<const T>(), bounds, a.d_x.as<T>(), a.d_out.shape[0], n, a.d_x.shape[1]);
  });
}

}  // namespace p2r::cuda

// Rows. Copies are grid-stride loops, one element or one aligned word of a row a thread. Sums: a
// block takes 32 columns of one segment; its 16 warps take the rows in turn and their sums are
// added in order.
#include "cuda/launch.cuh"
#include "cuda/vectors.cuh"
#include "cuda/workspace.h"
#include "ops/rows.h"

namespace p2r::cuda {

namespace {

constexpr int kBlock = 256;
constexpr int kSumBlock = 512, kSumRows = kSumBlock / 32;

template <class Word>
__global__ void __launch_bounds__(kBlock)
    gather_kernel(const Word* x, const int64_t* index, Word* out, int64_t n, int64_t words) {
  for (int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x; i < n * words;
       i += int64_t{gridDim.x} * kBlock)
    out[i] = x[index[i / words] * words + i % words];
}

// Row r of y's row source[r], or of x where that is negative; 0 where there is no y.
template <class Word>
__global__ void __launch_bounds__(kBlock)
    scatter_kernel(const Word* x, const Word* y, const int64_t* source, Word* out, int64_t n,
                   int64_t words) {
  for (int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x; i < n * words;
       i += int64_t{gridDim.x} * kBlock) {
    const int64_t row = source[i / words];
    out[i] = row < 0 ? x[i] : y ? y[row * words + i % words] : Word{};
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    scatter_add_kernel(const T* x, const T* y, const int64_t* offsets, const int64_t* list, T* out,
                       int64_t n, int64_t c) {
  for (int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * kBlock) {
    const int64_t r = i / c, last = offsets[r + 1];
    float sum = to_float(x[i]);
    for (int64_t k = offsets[r]; k < last; ++k) sum += to_float(y[list[k] * c + i % c]);
    out[i] = from_float<T>(sum);
  }
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

int64_t row_bytes(const View& v) {
  return row_size(v.shape) * static_cast<int64_t>(size_of(v.dtype));
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

void gather_rows(const GatherRowsArgs& a, Device& device) {
  const int64_t bytes = row_bytes(a.out), n = a.out.shape[0];
  if (!bytes || a.index.empty()) return;
  const int64_t* index = nullptr;
  const ScratchWorkspace scratch(
      device, [&](Workspace& workspace) { index = upload(device, workspace, a.index); });
  with_words(bytes, {a.x.data, a.out.data}, [&](auto* word) {
    using Word = std::remove_pointer_t<decltype(word)>;
    const int64_t words = bytes / static_cast<int64_t>(sizeof(Word));
    launch(gather_kernel<Word>, blocks_for(n * words, kBlock), kBlock, 0, stream_of(device),
           a.x.as<const Word>(), index, a.out.as<Word>(), n, words);
  });
}

void scatter_rows(const ScatterRowsArgs& a, Device& device) {
  const int64_t bytes = row_bytes(a.out), rows = a.out.shape[0];
  if (!bytes || !rows) return;
  const int64_t* source = nullptr;
  const ScratchWorkspace scratch(device, [&](Workspace& workspace) {
    source = upload(device, workspace, sources_of(a.index, rows));
  });
  with_words(bytes, {a.x.data, a.y.data, a.out.data}, [&](auto* word) {
    using Word = std::remove_pointer_t<decltype(word)>;
    const int64_t words = bytes / static_cast<int64_t>(sizeof(Word));
    launch(scatter_kernel<Word>, blocks_for(rows * words, kBlock), kBlock, 0, stream_of(device),
           a.x.as<const Word>(), a.y.as<const Word>(), source, a.out.as<Word>(), rows, words);
  });
}

void scatter_add_rows(const ScatterAddRowsArgs& a, Device& device) {
  const int64_t n = a.out.size();
  if (!n) return;
  const Inverse inverse = invert(a.index, a.out.shape[0]);
  const int64_t *offsets = nullptr, *list = nullptr;
  const ScratchWorkspace scratch(device, [&](Workspace& workspace) {
    offsets = upload(device, workspace, inverse.offsets);
    list = upload(device, workspace, inverse.list);
  });
  with_float_type(a.x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    launch(scatter_add_kernel<T>, blocks_for(n, kBlock), kBlock, 0, stream_of(device),
           a.x.as<const T>(), a.y.as<const T>(), offsets, list, a.out.as<T>(), n,
           row_size(a.out.shape));
  });
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

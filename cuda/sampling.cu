// Sampling by inversion of the cumulative distribution, one block a row. First the largest logit;
// then the weights of 256 equal parts of the row are summed, a part by one warp, so that loads are
// coalesced; the first warp finds the part that holds the drawn point and scans it 32 logits at a
// time. Weights are integers (ops/philox.h), so sums are exact in any order.
#include "cuda/reduce.cuh"
#include "ops/philox.h"
#include "ops/sampling.h"

namespace p2r::cuda {

namespace {

constexpr int kBlock = 256, kWarps = kBlock / 32;
constexpr uint32_t kFull = 0xFFFFFFFFu;

// The larger logit; of two equal ones the first.
__device__ __forceinline__ void keep_larger(float& best, int64_t& index, float other,
                                            int64_t other_index) {
  if (other > best || (other == best && other_index < index)) {
    best = other;
    index = other_index;
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    sample_kernel(const T* logits, int32_t* out, int64_t v, float rate, uint64_t seed, int bits,
                  FaultFlag fault) {
  SMEM_ARRAY(float, warp_best, kWarps);
  SMEM_ARRAY(int64_t, warp_index, kWarps);
  SMEM_ARRAY(uint64_t, sums, kBlock);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t row = blockIdx.x;
  const T* x = logits + row * v;

  float best = -INFINITY;
  int64_t index = INT64_MAX;
  bool invalid = false;
  for (int64_t i = threadIdx.x; i < v; i += kBlock) {
    const float value = to_float(x[i]);
    invalid |= !(value < INFINITY);
    keep_larger(best, index, value, i);
  }
#pragma unroll
  for (int lanes = 16; lanes; lanes >>= 1)
    keep_larger(best, index, __shfl_xor_sync(kFull, best, lanes),
                __shfl_xor_sync(kFull, index, lanes));
  if (lane == 0) {
    warp_best[warp] = best;
    warp_index[warp] = index;
  }
  invalid = __syncthreads_or(invalid);
  for (int i = 0; i < kWarps; ++i) keep_larger(best, index, warp_best[i], warp_index[i]);
  if (invalid || best == -INFINITY) {
    if (threadIdx.x == 0) {
      const float why = invalid && best < INFINITY ? NAN : best;
      ptx::raise(fault, row, __float_as_uint(why));
      out[row] = -1;
    }
    return;
  }
  if (rate == 0) {  // temperature 0
    if (threadIdx.x == 0) out[row] = static_cast<int32_t>(index);
    return;
  }

  const int64_t part = ceil_div(v, kBlock);
  for (int p = warp; p < kBlock; p += kWarps) {
    const int64_t last = (p + 1) * part < v ? (p + 1) * part : v;
    uint64_t sum = 0;
    for (int64_t i = p * part + lane; i < last; i += 32)
      sum += weight(best - to_float(x[i]), rate, bits);
    sum = warp_sum(sum);
    if (lane == 0) sums[p] = sum;
  }
  __syncthreads();
  if (warp) return;

  uint64_t total = 0;
  for (int p = 0; p < kBlock; ++p) total += sums[p];
  uint64_t rest = multiply_high(philox(seed, static_cast<uint64_t>(row)), total);
  int p = 0;
  while (rest >= sums[p]) rest -= sums[p++];
  for (int64_t first = p * part;; first += 32) {
    const int64_t i = first + lane;
    uint64_t cumulative = i < v ? weight(best - to_float(x[i]), rate, bits) : 0;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes <<= 1) {
      const uint64_t other = __shfl_up_sync(kFull, cumulative, static_cast<unsigned>(lanes));
      if (lane >= lanes) cumulative += other;
    }
    const uint32_t reached = __ballot_sync(kFull, rest < cumulative);
    if (reached) {
      if (lane == 0) out[row] = static_cast<int32_t>(first + __ffs(static_cast<int>(reached)) - 1);
      return;
    }
    rest -= __shfl_sync(kFull, cumulative, 31);
  }
}

}  // namespace

void sample(const SampleArgs& a, Device& device) {
  const int64_t rows = a.logits.shape[0], v = a.logits.shape[1];
  if (!rows) return;
  const float rate = a.temperature > 0 ? weight_rate(a.temperature) : 0.0f;
  with_float_type(a.logits.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    launch(sample_kernel<T>, static_cast<unsigned>(rows), kBlock, 0, stream_of(device),
           a.logits.as<const T>(), a.out.as<int32_t>(), v, rate, static_cast<uint64_t>(a.seed),
           weight_bits(v), a.fault);
  });
}

}  // namespace p2r::cuda

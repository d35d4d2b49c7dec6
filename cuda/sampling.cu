// One block a row. The largest logit first; then 256 equal parts of the row are summed, a warp to a
// part, so that reads are coalesced; the first warp finds the part that holds the target and walks
// through it 32 logits at a time. Sums are whole numbers (ops/philox.h), so their order is free.
#include "cuda/launch.cuh"
#include "ops/philox.h"
#include "ops/sampling.h"

namespace p2r::cuda {

namespace {

constexpr int kBlock = 256, kWarps = kBlock / 32;
constexpr uint32_t kAll = 0xFFFFFFFFu;

// The larger logit, the earlier of two equal ones.
__device__ __forceinline__ void take_larger(float& best, int64_t& where, float other,
                                            int64_t other_where) {
  if (other > best || (other == best && other_where < where)) {
    best = other;
    where = other_where;
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    sample_kernel(const T* logits, int32_t* out, int64_t v, float rate, uint64_t seed, int bits,
                  int32_t* fault) {
  SMEM_ARRAY(float, warp_best, kWarps);
  SMEM_ARRAY(int64_t, warp_where, kWarps);
  SMEM_ARRAY(uint64_t, sums, kBlock);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t row = blockIdx.x;
  const T* x = logits + row * v;

  float best = -INFINITY;
  int64_t where = INT64_MAX;
  bool bad = false;
  for (int64_t i = threadIdx.x; i < v; i += kBlock) {
    const float value = to_float(x[i]);
    bad |= !(value < INFINITY);
    take_larger(best, where, value, i);
  }
#pragma unroll
  for (int lanes = 16; lanes; lanes >>= 1)
    take_larger(best, where, __shfl_xor_sync(kAll, best, lanes),
                __shfl_xor_sync(kAll, where, lanes));
  if (lane == 0) {
    warp_best[warp] = best;
    warp_where[warp] = where;
  }
  bad = __syncthreads_or(bad);
  for (int i = 0; i < kWarps; ++i) take_larger(best, where, warp_best[i], warp_where[i]);
  if (bad || best == -INFINITY) {
    if (threadIdx.x == 0) {
      ptx::raise(fault);
      out[row] = -1;
    }
    return;
  }
  if (rate == 0) {  // temperature 0
    if (threadIdx.x == 0) out[row] = static_cast<int32_t>(where);
    return;
  }

  const int64_t part = (v + kBlock - 1) / kBlock;
  for (int p = warp; p < kBlock; p += kWarps) {
    const int64_t last = (p + 1) * part < v ? (p + 1) * part : v;
    uint64_t sum = 0;
    for (int64_t i = p * part + lane; i < last; i += 32)
      sum += weight(best - to_float(x[i]), rate, bits);
#pragma unroll
    for (int lanes = 16; lanes; lanes >>= 1) sum += __shfl_xor_sync(kAll, sum, lanes);
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
    uint64_t below = i < v ? weight(best - to_float(x[i]), rate, bits) : 0;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes <<= 1) {
      const uint64_t other = __shfl_up_sync(kAll, below, static_cast<unsigned>(lanes));
      if (lane >= lanes) below += other;
    }
    const uint32_t over = __ballot_sync(kAll, rest < below);
    if (over) {
      if (lane == 0) out[row] = static_cast<int32_t>(first + __ffs(static_cast<int>(over)) - 1);
      return;
    }
    rest -= __shfl_sync(kAll, below, 31);
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

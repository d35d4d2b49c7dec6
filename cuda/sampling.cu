// Sampling by inversion of the cumulative distribution, one block a row. First the largest logit;
// then the weights of 256 equal parts of the row are summed, a part by one warp, so that loads are
// coalesced; the first warp finds the part that holds the drawn point and scans it 32 logits at a
// time. Weights are integers (ops/philox.h), so sums are exact in any order.
//
// sample_tokens, one block a row too: a pass for the largest logit, one for the softmax's sum, and
// then each filter is a bound on the logits, found by radix selection. The first digit is of the
// distance from the largest logit, linear so that the 256 counters in shared memory share the
// logits out evenly and few threads wait for the same one; four more are the bytes of the logit
// itself, for the few that have the bound's first digit. top_k selects by number, top_p by weight,
// and the draw is sample's. A row of 151936 f32 is 0.6 MB and is read 4 times without filters, up
// to 16 times with top_k and top_p; for up to some 80 rows at once it stays in the L2 cache.
// Two blocks a multiprocessor are enough for it, and leave the registers that the kernel needs.
// Predicted on an H200 at 100 GB/s a multiprocessor: 25 µs and 100 µs, for 132 rows as for one.
#include "cuda/reduce.cuh"
#include "cuda/workspace.h"
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

// What a block keeps in shared memory: 256 sums, and what one thread found for all.
struct SharedSums {
  uint64_t (&sums)[kBlock];
  uint64_t (&found)[2];
};

// The smallest i at which the running sum of measure(i) exceeds target(the sum of all), which is
// returned in *total. For all threads of the block.
template <class Measure, class Target>
__device__ int64_t locate(int64_t v, const SharedSums& shared, uint64_t* total,
                          const Measure& measure, const Target& target) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t part = ceil_div(v, kBlock);
  __syncthreads();
  for (int p = warp; p < kBlock; p += kWarps) {
    const int64_t last = (p + 1) * part < v ? (p + 1) * part : v;
    uint64_t sum = 0;
    for (int64_t i = p * part + lane; i < last; i += 32) sum += measure(i);
    sum = warp_sum(sum);
    if (lane == 0) shared.sums[p] = sum;
  }
  __syncthreads();
  if (warp == 0) {
    uint64_t all = 0;
    for (int p = 0; p < kBlock; ++p) all += shared.sums[p];
    uint64_t rest = target(all);
    int p = 0;
    while (rest >= shared.sums[p]) rest -= shared.sums[p++];
    for (int64_t first = p * part;; first += 32) {
      const int64_t i = first + lane;
      uint64_t cumulative = i < v ? measure(i) : 0;
#pragma unroll
      for (int lanes = 1; lanes < 32; lanes <<= 1) {
        const uint64_t other = __shfl_up_sync(kFull, cumulative, static_cast<unsigned>(lanes));
        if (lane >= lanes) cumulative += other;
      }
      const uint32_t reached = __ballot_sync(kFull, rest < cumulative);
      if (reached) {
        if (lane == 0) {
          shared.found[0] = static_cast<uint64_t>(first + __ffs(static_cast<int>(reached)) - 1);
          shared.found[1] = all;
        }
        break;
      }
      rest -= __shfl_sync(kFull, cumulative, 31);
    }
  }
  __syncthreads();
  *total = shared.found[1];
  return static_cast<int64_t>(shared.found[0]);
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    sample_kernel(const T* logits, int32_t* out, int64_t v, float rate, uint64_t seed, int bits,
                  FaultFlag fault) {
  SMEM_ARRAY(float, warp_best, kWarps);
  SMEM_ARRAY(int64_t, warp_index, kWarps);
  SMEM_ARRAY(uint64_t, sums, kBlock);
  SMEM_ARRAY(uint64_t, found, 2);
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

  uint64_t total;
  const int64_t drawn = locate(
      v, {sums, found}, &total,
      [&](int64_t i) { return weight(best - to_float(x[i]), rate, bits); },
      [&](uint64_t all) { return multiply_high(philox(seed, static_cast<uint64_t>(row)), all); });
  if (threadIdx.x == 0) out[row] = static_cast<int32_t>(drawn);
}

// The logits of a row as they are and after the penalty, z; without a history they are the same.
template <class T>
struct RowLogits {
  const T* x;
  const float* penalized;
  int64_t v;

  __device__ __forceinline__ float logit(int64_t i) const { return to_float(x[i]); }
  // -0 becomes 0, to which it is equal.
  __device__ __forceinline__ float z(int64_t i) const {
    return (penalized ? penalized[i] : to_float(x[i])) + 0.0f;
  }
};

// A number that grows with x.
__device__ __forceinline__ uint32_t order_of(float x) {
  const uint32_t u = __float_as_uint(x);
  return u >> 31 ? ~u : u | 0x80000000u;
}
__device__ __forceinline__ float of_order(uint32_t order) {
  return __uint_as_float(order >> 31 ? order & 0x7FFFFFFFu : ~order);
}

// In which of 256 digits, from the highest down, the running sum of shared.sums reaches *target,
// from which the sum of the digits above is subtracted. For all threads of the block.
__device__ uint32_t digit_of(const SharedSums& shared, uint64_t* target) {
  const int lane = static_cast<int>(threadIdx.x);
  __syncthreads();
  if (lane < 32) {
    const int top = kBlock - 1 - lane * 8;
    uint64_t own = 0;
    for (int k = 0; k < 8; ++k) own += shared.sums[top - k];
    uint64_t cumulative = own;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes <<= 1) {
      const uint64_t other = __shfl_up_sync(kFull, cumulative, static_cast<unsigned>(lanes));
      if (lane >= lanes) cumulative += other;
    }
    const uint32_t reached = __ballot_sync(kFull, cumulative >= *target);
    if (lane == __ffs(static_cast<int>(reached)) - 1) {
      uint64_t rest = *target - (cumulative - own);
      int digit = top;
      while (rest > shared.sums[digit]) rest -= shared.sums[digit--];
      shared.found[0] = static_cast<uint64_t>(digit);
      shared.found[1] = rest;
    }
  }
  __syncthreads();
  *target = shared.found[1];
  return static_cast<uint32_t>(shared.found[0]);
}

// The largest bound at which measure(z) of the logits z of at least the bound reaches *target, from
// which the measure of those above the bound is subtracted. measure is 0 for logits that do not
// count. For all threads of the block.
template <class T, class Measure>
__device__ float select(const RowLogits<T>& row, float best, float rate, const SharedSums& shared,
                        uint64_t* target, const Measure& measure) {
  // 255 for the largest logit, falling by 4 with each halving of the weight.
  const auto nearness = [=](float z) {
    const float distance = (best - z) * rate;
    return distance < 63.75f ? 255u - static_cast<uint32_t>(distance * 4.0f) : 0u;
  };
  uint32_t near = 0, order = 0;
  for (int digit = 4; digit >= 0; --digit) {
    __syncthreads();
    shared.sums[threadIdx.x] = 0;
    __syncthreads();
    const int shift = 8 * digit;
    for (int64_t i = threadIdx.x; i < row.v; i += kBlock) {
      const float z = row.z(i);
      if (digit < 4 && nearness(z) != near) continue;
      const uint32_t own = order_of(z);
      if (digit < 3 && own >> (shift + 8) != order >> (shift + 8)) continue;
      const uint64_t m = measure(z);
      const uint32_t place = digit == 4 ? nearness(z) : own >> shift & 0xFF;
      if (m) atomicAdd(reinterpret_cast<unsigned long long*>(&shared.sums[place]), m);
    }
    const uint32_t found = digit_of(shared, target);
    if (digit == 4)
      near = found;
    else
      order |= found << shift;
  }
  return of_order(order);
}

template <class T>
__global__ void __launch_bounds__(kBlock, 2)
    sample_tokens_kernel(const T* logits, const float* penalized, const SampleRow* rows,
                         int32_t* tokens, float* log_probs, float* log_probs_filtered, int64_t v,
                         int bits, FaultFlag fault) {
  SMEM_ARRAY(float, warp_best, 2 * kWarps);
  SMEM_ARRAY(int64_t, warp_index, kWarps);
  SMEM_ARRAY(double, warp_sums, kWarps);
  SMEM_ARRAY(uint64_t, sums, kBlock);
  SMEM_ARRAY(uint64_t, found, 2);
  const SharedSums shared{sums, found};
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t r = blockIdx.x;
  const SampleRow s = rows[r];
  const RowLogits<T> row{logits + r * v, penalized ? penalized + r * v : nullptr, v};

  // The largest logit, and the largest z with its place.
  float top = -INFINITY, best = -INFINITY;
  int64_t index = INT64_MAX;
  bool invalid = false;
  for (int64_t i = threadIdx.x; i < v; i += kBlock) {
    const float x = row.logit(i), z = row.z(i);
    invalid |= !(x < INFINITY) || !(z < INFINITY);
    top = x > top ? x : top;
    keep_larger(best, index, z, i);
  }
#pragma unroll
  for (int lanes = 16; lanes; lanes >>= 1) {
    const float other = __shfl_xor_sync(kFull, top, lanes);
    top = other > top ? other : top;
    keep_larger(best, index, __shfl_xor_sync(kFull, best, lanes),
                __shfl_xor_sync(kFull, index, lanes));
  }
  if (lane == 0) {
    warp_best[warp] = best;
    warp_best[kWarps + warp] = top;
    warp_index[warp] = index;
  }
  invalid = __syncthreads_or(invalid);
  for (int i = 0; i < kWarps; ++i) {
    keep_larger(best, index, warp_best[i], warp_index[i]);
    top = warp_best[kWarps + i] > top ? warp_best[kWarps + i] : top;
  }
  if (invalid || best == -INFINITY) {
    if (threadIdx.x == 0) {
      const float why = invalid && best < INFINITY ? NAN : best;
      ptx::raise(fault, r, __float_as_uint(why));
      tokens[r] = -1;
      log_probs[r] = log_probs_filtered[r] = NAN;
    }
    return;
  }

  float exponentials = 0;
  const float inverse = static_cast<float>(s.inverse);
  for (int64_t i = threadIdx.x; i < v; i += kBlock)
    exponentials += ptx::ex2((row.logit(i) - top) * inverse * kLog2e);
  const double log_sum = log(block_sum<kWarps>(exponentials, warp_sums));

  const auto weight_of = [=](float z) { return weight(best - z, s.rate, bits); };
  int64_t token = index;
  double filtered = 0;
  if (s.rate > 0) {
    float low = -INFINITY;
    int64_t last_tie = INT64_MAX;
    if (s.top_k) {
      uint64_t target = static_cast<uint64_t>(s.top_k);
      low = select(row, best, s.rate, shared, &target, [](float) { return uint64_t{1}; });
    }
    uint64_t total;
    if (s.top_p) {
      const float limit = low;
      const auto mass = [&](float z) { return z >= limit ? weight_of(z) : uint64_t{0}; };
      const auto mass_at = [&](int64_t i) { return mass(row.z(i)); };
      locate(v, shared, &total, mass_at, [](uint64_t) { return uint64_t{0}; });
      uint64_t target = mass_to_keep(total, s.top_p);
      low = select(row, best, s.rate, shared, &target, mass);
      // As many of the bound's equals as reach the rest.
      const uint64_t one = weight_of(low), ties = (target + one - 1) / one;
      const auto is_tie = [&](int64_t i) { return static_cast<uint64_t>(row.z(i) == low); };
      last_tie = locate(v, shared, &total, is_tie, [=](uint64_t) { return ties - 1; });
    }
    const auto kept = [&](int64_t i) {
      const float z = row.z(i);
      if (z < low || (z == low && i > last_tie)) return uint64_t{0};
      const uint64_t w = weight_of(z);
      return w < s.min_weight ? uint64_t{0} : w;
    };
    token =
        locate(v, shared, &total, kept, [=](uint64_t all) { return multiply_high(s.random, all); });
    const double mass = static_cast<double>(total) / static_cast<double>(weight_of(best));
    filtered = (static_cast<double>(row.z(token)) - best) * s.inverse - log(mass);
  }
  if (threadIdx.x) return;
  const double log_prob = (static_cast<double>(row.logit(token)) - top) * s.inverse - log_sum;
  tokens[r] = static_cast<int32_t>(token);
  log_probs[r] = static_cast<float>(log_prob);
  log_probs_filtered[r] =
      static_cast<float>(s.rate > 0 && !s.has_filter() && !s.has_history() ? log_prob : filtered);
}

template <class T>
__global__ void __launch_bounds__(kBlock) widen_kernel(const T* x, float* out, int64_t n) {
  for (int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * kBlock)
    out[i] = to_float(x[i]);
}

// A block a row: each token of the history stands in it once.
__global__ void __launch_bounds__(kBlock)
    penalize_kernel(float* z, const SampleRow* rows, const int64_t* history, int64_t v) {
  const int64_t r = blockIdx.x;
  const SampleRow s = rows[r];
  for (int64_t k = s.history_begin + threadIdx.x; k < s.history_end; k += kBlock) {
    float& at = z[r * v + history[k]];
    at = penalized(at, s.penalty);
  }
}

}  // namespace

void sample_tokens(const SampleTokensArgs& a, Device& device) {
  const int64_t rows = a.logits.shape[0], v = a.logits.shape[1];
  if (!rows) return;
  std::vector<SampleRow> settings;
  for (int64_t r = 0; r < rows; ++r) settings.push_back(sample_row(a, r));
  const SampleRow* on_device = nullptr;
  const int64_t* history = nullptr;
  float* penalized = nullptr;
  const ScratchWorkspace scratch(device, [&](Workspace& workspace) {
    on_device = upload(device, workspace, settings);
    if (a.history.empty()) return;
    history = upload(device, workspace, a.history);
    penalized = workspace.take<float>(rows * v);
  });
  with_float_type(a.logits.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const T* logits = a.logits.as<const T>();
    const cudaStream_t stream = stream_of(device);
    if (penalized) {
      launch(widen_kernel<T>, blocks_for(rows * v, kBlock), kBlock, 0, stream, logits, penalized,
             rows * v);
      launch(penalize_kernel, static_cast<unsigned>(rows), kBlock, 0, stream, penalized, on_device,
             history, v);
    }
    launch(sample_tokens_kernel<T>, static_cast<unsigned>(rows), kBlock, 0, stream, logits,
           static_cast<const float*>(penalized), on_device, a.tokens.as<int32_t>(),
           a.log_probs.as<float>(), a.log_probs_filtered.as<float>(), v, weight_bits(v), a.fault);
  });
}

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

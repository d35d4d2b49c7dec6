// Group advantages. The host sorts the batch by group; a warp owns a group and takes two passes
// over its rewards in f64, lanes in strides, joined by a fixed tree. Whitening is one block over
// the batch. All of it is small: what matters is that it is exact and never leaves the device.
#include "cuda/launch.cuh"
#include "ops/advantages.h"

namespace p2r::cuda {

namespace {

constexpr int kBlock = 256, kWarps = kBlock / 32;
constexpr unsigned kFull = 0xffffffffu;

__device__ __forceinline__ double warp_sum(double x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kFull, x, step);
  return x;
}

// The sum over the block, for every thread; `shared` holds kWarps values.
__device__ double block_sum(double x, double* shared) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0;
  for (int i = 0; i < kWarps; ++i) total += shared[i];
  return total;
}

__global__ void __launch_bounds__(kBlock)
    count_kernel(const uint8_t* mask, const int64_t* cu_seqlens, double* lengths, int32_t* fault) {
  SMEM_ARRAY(double, shared, kWarps);
  double kept = 0, wrong = 0;
  for (int64_t t = cu_seqlens[blockIdx.x] + threadIdx.x; t < cu_seqlens[blockIdx.x + 1];
       t += kBlock) {
    kept += mask[t];
    wrong += mask[t] > 1;
  }
  kept = block_sum(kept, shared);
  wrong = block_sum(wrong, shared);
  if (threadIdx.x == 0) {
    lengths[blockIdx.x] = wrong > 0 ? static_cast<double>(NAN) : kept;
    if (wrong > 0) ptx::raise(fault);
  }
}

struct Groups {
  const int32_t *order, *starts;
  const float* rewards;
  int64_t count;
};

// What a warp learns of one kind of rewards in its group.
struct Spread {
  bool finite, mixed;
  double mean;
};
__device__ Spread spread_of(const float* rewards, const int32_t* members, int n, int64_t kinds,
                            int64_t kind) {
  const int lane = threadIdx.x % 32;
  double total = 0;
  float low = INFINITY, high = -INFINITY;
  int bad = 0;
  for (int i = lane; i < n; i += 32) {
    const float r = rewards[members[i] * kinds + kind];
    bad |= !(fabsf(r) < INFINITY);
    low = fminf(low, r);
    high = fmaxf(high, r);
    total += r;
  }
  for (int step = 16; step > 0; step /= 2) {
    bad |= __shfl_xor_sync(kFull, bad, step);
    low = fminf(low, __shfl_xor_sync(kFull, low, step));
    high = fmaxf(high, __shfl_xor_sync(kFull, high, step));
  }
  total = warp_sum(total);
  return {bad == 0, high > low, total / n};
}

struct Relate {
  Groups groups;
  const double *weights, *lengths;
  int64_t kinds;
  Estimator estimator;
  double epsilon;
  bool singleton_zero;
  double* out;
  int32_t* fault;
};

__global__ void __launch_bounds__(kBlock) relate_kernel(Relate a) {
  const int64_t group = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (group >= a.groups.count) return;
  const int lane = threadIdx.x % 32;
  const int32_t* members = a.groups.order + a.groups.starts[group];
  const int n = a.groups.starts[group + 1] - a.groups.starts[group];
  const bool scaled = a.estimator == Estimator::grpo || a.estimator == Estimator::gdpo;
  for (int i = lane; i < n; i += 32) a.out[members[i]] = 0;
  for (int64_t k = 0; k < a.kinds; ++k) {
    const Spread s = spread_of(a.groups.rewards, members, n, a.kinds, k);
    const auto reward = [&](int i) {
      return static_cast<double>(a.groups.rewards[members[i] * a.kinds + k]);
    };
    double base = s.mean, divisor = 1;
    bool silent = !s.mixed;
    if (!s.finite) {
      base = NAN;
      silent = false;
      if (lane == 0) ptx::raise(a.fault);
    } else if (n == 1) {
      base = 0;
      silent = a.singleton_zero;
      if (scaled) divisor = 1 + a.epsilon;
    } else if (scaled) {
      double squares = 0;
      for (int i = lane; i < n; i += 32) squares += (reward(i) - base) * (reward(i) - base);
      divisor = sqrt(warp_sum(squares) / (n - 1)) + a.epsilon;
    } else if (a.estimator == Estimator::rloo) {
      divisor = static_cast<double>(n - 1) / n;
    } else if (a.estimator == Estimator::opo) {
      double tokens = 0, weighted = 0;
      for (int i = lane; i < n; i += 32) {
        tokens += a.lengths[members[i]];
        weighted += a.lengths[members[i]] * reward(i);
      }
      tokens = warp_sum(tokens);
      weighted = warp_sum(weighted);
      if (tokens > 0) base = weighted / tokens;
    }
    if (silent) continue;
    const double weight = a.weights[k];
    for (int i = lane; i < n; i += 32) a.out[members[i]] += weight * ((reward(i) - base) / divisor);
  }
}

__global__ void __launch_bounds__(kBlock)
    finish_kernel(const double* values, const double* lengths, int64_t n, bool whiten, float* out) {
  SMEM_ARRAY(double, shared, kWarps);
  double mean = 0, scale = 1;
  if (whiten) {
    double tokens = 0, total = 0, squares = 0;
    for (int64_t i = threadIdx.x; i < n; i += kBlock) {
      tokens += lengths[i];
      total += lengths[i] * values[i];
    }
    tokens = block_sum(tokens, shared);
    mean = block_sum(total, shared) / (tokens + 1e-8);
    for (int64_t i = threadIdx.x; i < n; i += kBlock)
      squares += lengths[i] * (values[i] - mean) * (values[i] - mean);
    const double variance = block_sum(squares, shared) / (tokens + 1e-8) * tokens / (tokens - 1);
    scale = tokens > 1 ? 1 / sqrt(variance + 1e-8) : 0;
  }
  for (int64_t i = threadIdx.x; i < n; i += kBlock)
    out[i] = static_cast<float>(scale == 0 ? 0 : (values[i] - mean) * scale);
}

__global__ void __launch_bounds__(kBlock)
    informative_kernel(Groups groups, uint8_t* out, int32_t* fault) {
  const int64_t group = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (group >= groups.count) return;
  const int lane = threadIdx.x % 32;
  const int32_t* members = groups.order + groups.starts[group];
  const int n = groups.starts[group + 1] - groups.starts[group];
  const Spread s = spread_of(groups.rewards, members, n, 1, 0);
  if (!s.finite && lane == 0) ptx::raise(fault);
  for (int i = lane; i < n; i += 32) out[members[i]] = s.finite && (s.mixed || n == 1);
}

// Copies a host vector behind `at` and moves on, keeping to multiples of 16 bytes.
template <class T>
const T* place(Device& device, char*& at, const std::vector<T>& data) {
  const size_t bytes = data.size() * sizeof(T);
  const T* out = reinterpret_cast<const T*>(at);
  if (bytes) device.upload(at, data.data(), bytes);
  at += (bytes + 15) / 16 * 16;
  return out;
}
template <class T>
size_t room(size_t count) {
  return (count * sizeof(T) + 15) / 16 * 16;
}

unsigned warp_blocks(int64_t groups) { return static_cast<unsigned>(ceil_div(groups, kWarps)); }

}  // namespace

void group_advantages(const GroupAdvantagesArgs& a, Device& device) {
  const int64_t n = a.advantages.size();
  if (!n) return;
  const GroupIndex index = index_groups(a.groups);
  Scratch scratch = device.scratch(
      room<int32_t>(index.order.size()) + room<int32_t>(index.starts.size()) +
      room<double>(a.weights.size()) + room<int64_t>(a.cu_seqlens.size()) + 2 * room<double>(n));
  char* at = scratch.as<char>();
  Relate r;
  r.groups = {place(device, at, index.order), place(device, at, index.starts),
              a.rewards.as<const float>(), index.count()};
  r.weights = place(device, at, a.weights);
  const int64_t* cu_seqlens = place(device, at, a.cu_seqlens);
  double* lengths = reinterpret_cast<double*>(at);
  r.lengths = lengths;
  if (a.mask)
    launch(count_kernel, static_cast<unsigned>(n), kBlock, 0, stream_of(device),
           a.mask.as<const uint8_t>(), cu_seqlens, lengths, a.fault);
  else
    place(device, at, std::vector<double>(a.lengths.begin(), a.lengths.end()));
  r.out = lengths + room<double>(n) / sizeof(double);
  r.kinds = static_cast<int64_t>(a.weights.size());
  r.estimator = a.estimator;
  r.epsilon = a.epsilon;
  r.singleton_zero = a.singleton_zero;
  r.fault = a.fault;
  launch(relate_kernel, warp_blocks(index.count()), kBlock, 0, stream_of(device), r);
  launch(finish_kernel, 1u, kBlock, 0, stream_of(device), static_cast<const double*>(r.out),
         r.lengths, n, whitens(a.estimator), a.advantages.as<float>());
}

void informative_groups(const InformativeGroupsArgs& a, Device& device) {
  if (!a.informative.size()) return;
  const GroupIndex index = index_groups(a.groups);
  Scratch scratch =
      device.scratch(room<int32_t>(index.order.size()) + room<int32_t>(index.starts.size()));
  char* at = scratch.as<char>();
  Groups groups = {place(device, at, index.order), place(device, at, index.starts),
                   a.rewards.as<const float>(), index.count()};
  launch(informative_kernel, warp_blocks(index.count()), kBlock, 0, stream_of(device), groups,
         a.informative.as<uint8_t>(), a.fault);
}

}  // namespace p2r::cuda

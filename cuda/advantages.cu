// Group advantages. The host sorts the batch by group; a warp takes a group and makes two passes
// over its rewards in f64, each lane every 32nd, reduced by a fixed tree. What the whole
// batch decides (its standard deviation, whitening) is one block over its sequences. All of it is
// small: what matters is exact results that stay on the device.
#include "cuda/reduce.cuh"
#include "cuda/workspace.h"
#include "ops/advantages.h"

namespace p2r::cuda {

namespace {

constexpr int kBlock = 256, kWarps = kBlock / 32;
constexpr unsigned kFull = 0xffffffffu;

__global__ void __launch_bounds__(kBlock)
    count_kept_kernel(const uint8_t* mask, const int64_t* cu_seqlens, double* lengths,
                      FaultFlag fault) {
  SMEM_ARRAY(double, shared, kWarps);
  double kept = 0, invalid = 0;
  for (int64_t t = cu_seqlens[blockIdx.x] + threadIdx.x; t < cu_seqlens[blockIdx.x + 1];
       t += kBlock) {
    kept += mask[t];
    if (mask[t] > 1) {
      ptx::raise(fault, t, mask[t], true);
      invalid = 1;
    }
  }
  kept = block_sum<kWarps>(kept, shared);
  invalid = block_sum<kWarps>(invalid, shared);
  if (threadIdx.x == 0) {
    lengths[blockIdx.x] = invalid > 0 ? static_cast<double>(NAN) : kept;
  }
}

struct Advantages {
  const int32_t *order, *starts;
  const float *rewards, *baselines;
  const double* weights;
  double* lengths;
  int64_t groups, sequences, given;  // given: kinds of rewards before they are combined
  Estimator estimator;
  double epsilon;
  bool singleton_zero, skip_empty;
  RewardScale scale;
  Combine combine;
  int64_t kinds;
  double *values, *out;  // rewards [sequences, kinds], NaN: does not count; advantages
  double* batch;         // standard deviation, and gpg's alpha
  // opt_baseline
  const float *log_probs, *squared_probs, *importance;
  const uint8_t* mask;
  const int64_t* cu_seqlens;
  bool zero_tail;
  double* cumulative;
  int64_t* kept_ends;  // of each sequence, past its last kept token, from its first
  float* token_out;
  FaultFlag fault;
};

__device__ __forceinline__ bool is_nan(double x) { return x != x; }

__device__ __forceinline__ bool counts(const double* values, int64_t kinds, int64_t i) {
  for (int64_t k = 0; k < kinds; ++k)
    if (!is_nan(values[i * kinds + k])) return true;
  return false;
}

__device__ double checked_reward(const Advantages& a, float r, int64_t position) {
  if (fabsf(r) < INFINITY || (a.combine != Combine::separate && r != r)) return r;
  ptx::raise(a.fault, position, __float_as_uint(r));
  return static_cast<double>(INFINITY);  // NaN would not count
}

__global__ void __launch_bounds__(kBlock) read_rewards_kernel(Advantages a) {
  const int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  if (i >= a.sequences) return;
  const double nan = static_cast<double>(NAN);
  const bool summed = a.combine == Combine::sum_then_normalize;
  const bool skipped = a.skip_empty && a.lengths[i] == 0;
  double total = 0;
  bool any = false;
  for (int64_t k = 0; k < a.given; ++k) {
    const double r = checked_reward(a, a.rewards[i * a.given + k], i * a.given + k);
    if (!summed) a.values[i * a.kinds + k] = skipped ? nan : r;
    if (is_nan(r)) continue;
    any = true;
    total += a.weights[k] * r;
  }
  if (summed) a.values[i] = any && !skipped ? total : nan;
  if (a.baselines) a.values[i] -= checked_reward(a, a.baselines[i], a.sequences * a.given + i);
  if (a.lengths && !counts(a.values, a.kinds, i)) a.lengths[i] = 0;
  a.out[i] = 0;
}

__global__ void __launch_bounds__(kBlock) batch_stats_kernel(Advantages a) {
  SMEM_ARRAY(double, shared, kWarps);
  double count = 0, nonzero = 0, total = 0, squares = 0;
  for (int64_t i = threadIdx.x; i < a.sequences; i += kBlock) {
    if (is_nan(a.values[i])) continue;
    count += 1;
    nonzero += a.values[i] != 0;
    total += a.values[i];
  }
  count = block_sum<kWarps>(count, shared);
  nonzero = block_sum<kWarps>(nonzero, shared);
  const double mean = block_sum<kWarps>(total, shared) / count;
  for (int64_t i = threadIdx.x; i < a.sequences; i += kBlock)
    if (!is_nan(a.values[i])) squares += (a.values[i] - mean) * (a.values[i] - mean);
  squares = block_sum<kWarps>(squares, shared);
  if (threadIdx.x != 0) return;
  a.batch[0] = count > 1 ? sqrt(squares / (count - 1)) : 1;
  a.batch[1] = count / (nonzero > 1 ? nonzero : 1);
}

__device__ __forceinline__ double warp_min(double x) {
  for (int step = 16; step > 0; step /= 2) {
    const double other = __shfl_xor_sync(kFull, x, step);
    x = other < x ? other : x;
  }
  return x;
}

// Of one kind of reward in one group; computed by a warp.
template <class Reward>
__device__ RewardStats reward_stats(int n, Reward reward) {
  const int lane = threadIdx.x % 32;
  double total = 0, count = 0, infinite = 0;
  double low = static_cast<double>(INFINITY), high = -low;
  for (int i = lane; i < n; i += 32) {
    const double r = reward(i);
    if (is_nan(r)) continue;
    infinite += !(fabs(r) < static_cast<double>(INFINITY));
    low = r < low ? r : low;
    high = r > high ? r : high;
    total += r;
    count += 1;
  }
  total = warp_sum(total);
  count = warp_sum(count);
  const bool finite = warp_sum(infinite) == 0;
  low = warp_min(low);
  high = -warp_min(-high);
  return {finite, count, low, high, finite ? total / count : static_cast<double>(NAN)};
}

__global__ void __launch_bounds__(kBlock) advantages_kernel(Advantages a) {
  const int64_t group = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (group >= a.groups) return;
  const int lane = threadIdx.x % 32;
  const int32_t* members = a.order + a.starts[group];
  const int n = a.starts[group + 1] - a.starts[group];
  for (int64_t k = 0; k < a.kinds; ++k) {
    const auto reward = [&](int i) { return a.values[members[i] * a.kinds + k]; };
    const RewardStats s = reward_stats(n, reward);
    double std = 0, baseline = s.mean;
    if (s.finite && s.n > 1) {
      if (takes_scale(a.estimator) || a.estimator == Estimator::gdpo) {
        double squares = 0;
        for (int i = lane; i < n; i += 32)
          if (!is_nan(reward(i))) squares += (reward(i) - s.mean) * (reward(i) - s.mean);
        std = sqrt(warp_sum(squares) / (s.n - 1));
      }
      if (a.estimator == Estimator::grpo_passk) {
        // The second best is the best if two have it.
        double second = -static_cast<double>(INFINITY), best = 0;
        for (int i = lane; i < n; i += 32) {
          best += reward(i) == s.high;
          if (reward(i) < s.high && reward(i) > second) second = reward(i);
        }
        best = warp_sum(best);
        second = -warp_min(-second);
        baseline = best > 1 ? s.high : second;
      } else if (a.estimator == Estimator::opo) {
        double tokens = 0, weighted = 0;
        for (int i = lane; i < n; i += 32) {
          if (is_nan(reward(i))) continue;
          tokens += a.lengths[members[i]];
          weighted += a.lengths[members[i]] * reward(i);
        }
        tokens = warp_sum(tokens);
        weighted = warp_sum(weighted);
        if (tokens > 0) baseline = weighted / tokens;
      }
    }
    const Baseline b = baseline_of(a.estimator, a.scale, a.epsilon, a.singleton_zero, s, std,
                                   baseline, a.batch[0], a.batch[1]);
    if (b.is_zero) continue;
    const double weight = a.combine == Combine::sum_then_normalize ? 1 : a.weights[k];
    for (int i = lane; i < n; i += 32) {
      if (is_nan(reward(i))) continue;
      const double above = reward(i) - b.baseline;
      if (a.estimator == Estimator::grpo_passk && above <= 0) continue;
      a.out[members[i]] += weight * (above / b.divisor);
    }
  }
}

// W_t of the tokens of a sequence and where its kept tokens end, by a warp: a scan of 32 tokens at
// a time.
__global__ void __launch_bounds__(kBlock) cumulative_weights_kernel(Advantages a) {
  const int64_t sequence = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (sequence >= a.sequences) return;
  const int lane = threadIdx.x % 32;
  double total = 0;
  int64_t kept_end = 0;
  for (int64_t begin = a.cu_seqlens[sequence]; begin < a.cu_seqlens[sequence + 1]; begin += 32) {
    const int64_t t = begin + lane;
    const bool inside = t < a.cu_seqlens[sequence + 1];
    double x = 0;
    if (inside && (!a.mask || a.mask[t])) {
      const double w = a.importance ? a.importance[t] : 1;
      x = w * w *
          (1 - 2 * exp(static_cast<double>(a.log_probs[t])) +
           static_cast<double>(a.squared_probs[t]));
      kept_end = t + 1 - a.cu_seqlens[sequence];
    }
    for (int step = 1; step < 32; step *= 2) {
      const double before = __shfl_up_sync(kFull, x, step);
      if (lane >= step) x += before;
    }
    if (inside) a.cumulative[t] = total + x;
    total += __shfl_sync(kFull, x, 31);
  }
  for (int step = 16; step > 0; step /= 2) {
    const int64_t other = __shfl_xor_sync(kFull, kept_end, step);
    kept_end = other > kept_end ? other : kept_end;
  }
  if (lane == 0) a.kept_ends[sequence] = kept_end;
}

// The advantages of a group's tokens: a block a group, a thread a position.
__global__ void __launch_bounds__(kBlock) token_advantages_kernel(Advantages a) {
  const int32_t* members = a.order + a.starts[blockIdx.x];
  const int n = a.starts[blockIdx.x + 1] - a.starts[blockIdx.x];
  const RewardStats s = reward_stats(n, [&](int i) { return a.values[members[i]]; });
  const bool alone = s.n == 1, equal = s.finite && !alone && !(s.high > s.low);
  int64_t longest = 0;
  // Past the last kept token of all sequences, and of all but one.
  int64_t last_end = 0, second_end = 0;
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    const int64_t length = a.cu_seqlens[members[i] + 1] - a.cu_seqlens[members[i]];
    longest = length > longest ? length : longest;
    if (is_nan(a.values[members[i]])) continue;
    const int64_t end = a.kept_ends[members[i]];
    const int64_t smaller = end < last_end ? end : last_end;
    second_end = smaller > second_end ? smaller : second_end;
    last_end = end > last_end ? end : last_end;
  }
  const int64_t tail = a.zero_tail ? second_end : longest;  // positions without a baseline
  for (int64_t at = threadIdx.x; at < longest; at += kBlock) {
    const auto token = [&](int i) {
      const int64_t t = a.cu_seqlens[members[i]] + at;
      return t < a.cu_seqlens[members[i] + 1] ? t : -1;
    };
    const auto kept = [&](int64_t t) { return t >= 0 && (!a.mask || a.mask[t]); };
    double weighted = 0, weights = 0;
// Unrolled, the loop spills on sm_80.
#pragma unroll 1
    for (int i = 0; i < n; ++i) {
      const int64_t t = token(i);
      const double r = a.values[members[i]];
      if (!kept(t) || is_nan(r)) continue;
      weighted += r * a.cumulative[t];
      weights += a.cumulative[t];
    }
    const bool without = alone || at >= tail;
    const double baseline = without ? 0 : weighted / (weights + 1e-8);
    for (int i = 0; i < n; ++i) {
      const int64_t t = token(i);
      if (t < 0) continue;
      const double r = a.values[members[i]];
      const bool zero = !kept(t) || is_nan(r) ||
                        (s.finite && ((equal && !without) || (alone && a.singleton_zero)));
      a.token_out[t] = zero ? 0 : s.finite ? static_cast<float>(r - baseline) : NAN;
    }
  }
}

// Whitens over the tokens of the batch, or normalizes over its sequences, and rounds.
__global__ void __launch_bounds__(kBlock) finish_kernel(Advantages a, float* out) {
  SMEM_ARRAY(double, shared, kWarps);
  const int64_t n = a.sequences;
  const bool by_tokens = whitens(a.estimator);
  double mean = 0, divisor = 1;
  bool zero = false;
  if (by_tokens) {
    double tokens = 0, total = 0, squares = 0;
    for (int64_t i = threadIdx.x; i < n; i += kBlock) {
      tokens += a.lengths[i];
      total += a.lengths[i] * a.out[i];
    }
    tokens = block_sum<kWarps>(tokens, shared);
    mean = block_sum<kWarps>(total, shared) / (tokens + 1e-8);
    for (int64_t i = threadIdx.x; i < n; i += kBlock)
      squares += a.lengths[i] * (a.out[i] - mean) * (a.out[i] - mean);
    const double variance =
        block_sum<kWarps>(squares, shared) / (tokens + 1e-8) * tokens / (tokens - 1);
    divisor = sqrt(variance + 1e-8);
    zero = !(tokens > 1);
  } else if (a.combine == Combine::normalize_then_sum) {
    double count = 0, total = 0, squares = 0, differ = 0;
    for (int64_t i = threadIdx.x; i < n; i += kBlock) {
      if (!counts(a.values, a.kinds, i)) continue;
      count += 1;
      total += a.out[i];
    }
    count = block_sum<kWarps>(count, shared);
    mean = block_sum<kWarps>(total, shared) / count;
    double first = 0;  // of the sequences that count
    for (int64_t i = 0; i < n; ++i)
      if (counts(a.values, a.kinds, i)) {
        first = a.out[i];
        break;
      }
    for (int64_t i = threadIdx.x; i < n; i += kBlock) {
      if (!counts(a.values, a.kinds, i)) continue;
      squares += (a.out[i] - mean) * (a.out[i] - mean);
      differ += a.out[i] != first;
    }
    divisor = sqrt(block_sum<kWarps>(squares, shared) / (count - 1)) + a.epsilon;
    zero = block_sum<kWarps>(differ, shared) == 0;
  }
  for (int64_t i = threadIdx.x; i < n; i += kBlock)
    out[i] =
        zero || !counts(a.values, a.kinds, i) ? 0 : static_cast<float>((a.out[i] - mean) / divisor);
}

__global__ void __launch_bounds__(kBlock)
    informative_kernel(const int32_t* order, const int32_t* starts, int64_t groups,
                       const float* rewards, uint8_t* out, FaultFlag fault) {
  const int64_t group = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (group >= groups) return;
  const int lane = threadIdx.x % 32;
  const int32_t* members = order + starts[group];
  const int n = starts[group + 1] - starts[group];
  const RewardStats s = reward_stats(n, [&](int i) {
    const float r = rewards[members[i]];
    if (!(fabsf(r) < INFINITY)) ptx::raise(fault, members[i], __float_as_uint(r));
    return r != r ? static_cast<double>(INFINITY) : static_cast<double>(r);
  });
  for (int i = lane; i < n; i += 32) out[members[i]] = s.finite && (s.high > s.low || n == 1);
}

unsigned warp_blocks(int64_t groups) { return static_cast<unsigned>(ceil_div(groups, kWarps)); }

}  // namespace

void group_advantages(const GroupAdvantagesArgs& a, Device& device) {
  const int64_t n = a.rewards.shape[0];
  if (!a.advantages.size()) return;
  const GroupIndex index = index_groups(a.groups);
  const bool by_token = a.estimator == Estimator::opt_baseline;
  Advantages r = {};
  r.rewards = a.rewards.as<const float>();
  r.baselines = a.baselines.as<const float>();
  r.groups = index.count();
  r.sequences = n;
  r.given = static_cast<int64_t>(a.weights.size());
  r.kinds = a.combine == Combine::sum_then_normalize ? 1 : r.given;
  r.estimator = a.estimator;
  r.epsilon = a.epsilon;
  r.singleton_zero = a.singleton_zero;
  r.skip_empty = a.skip_empty;
  r.scale = a.scale;
  r.combine = a.combine;
  r.log_probs = a.log_probs.as<const float>();
  r.squared_probs = a.squared_probs.as<const float>();
  r.importance = a.importance_weights.as<const float>();
  r.mask = a.mask.as<const uint8_t>();
  r.zero_tail = a.zero_tail;
  r.token_out = a.advantages.as<float>();
  r.fault = a.fault;
  const ScratchWorkspace scratch(device, [&](Workspace& workspace) {
    r.order = upload(device, workspace, index.order);
    r.starts = upload(device, workspace, index.starts);
    r.weights = upload(device, workspace, a.weights);
    if (!a.cu_seqlens.empty()) r.cu_seqlens = upload(device, workspace, a.cu_seqlens);
    if (a.mask || !a.lengths.empty()) r.lengths = workspace.take<double>(n);
    r.values = workspace.take<double>(n * r.kinds);
    r.out = workspace.take<double>(n);
    r.batch = workspace.take<double>(2);
    if (!by_token) return;
    r.cumulative = workspace.take<double>(a.log_probs.size());
    r.kept_ends = workspace.take<int64_t>(n);
  });
  cudaStream_t stream = stream_of(device);
  if (!a.lengths.empty()) {
    const std::vector<double> lengths(a.lengths.begin(), a.lengths.end());
    device.upload(r.lengths, lengths.data(), lengths.size() * sizeof(double));
  }
  if (a.mask)
    launch(count_kept_kernel, static_cast<unsigned>(n), kBlock, 0, stream, r.mask, r.cu_seqlens,
           r.lengths, a.fault);
  launch(read_rewards_kernel, static_cast<unsigned>(ceil_div(n, kBlock)), kBlock, 0, stream, r);
  if (by_token) {
    launch(cumulative_weights_kernel, warp_blocks(n), kBlock, 0, stream, r);
    launch(token_advantages_kernel, static_cast<unsigned>(index.count()), kBlock, 0, stream, r);
    return;
  }
  if (r.kinds == 1) launch(batch_stats_kernel, 1u, kBlock, 0, stream, r);
  launch(advantages_kernel, warp_blocks(index.count()), kBlock, 0, stream, r);
  launch(finish_kernel, 1u, kBlock, 0, stream, r, a.advantages.as<float>());
}

void informative_groups(const InformativeGroupsArgs& a, Device& device) {
  if (!a.informative.size()) return;
  const GroupIndex index = index_groups(a.groups);
  const int32_t *order = nullptr, *starts = nullptr;
  const ScratchWorkspace scratch(device, [&](Workspace& workspace) {
    order = upload(device, workspace, index.order);
    starts = upload(device, workspace, index.starts);
  });
  launch(informative_kernel, warp_blocks(index.count()), kBlock, 0, stream_of(device), order,
         starts, index.count(), a.rewards.as<const float>(), a.informative.as<uint8_t>(), a.fault);
}

}  // namespace p2r::cuda

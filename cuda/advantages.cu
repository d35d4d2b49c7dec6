// Group advantages. The host sorts the batch by group; a warp takes a group and makes two passes
// over its rewards in f64, each lane every 32nd, reduced by a fixed tree. Whitening is one block
// over the batch. All of it is small: what matters is exact results that stay on the device.
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

struct Groups {
  const int32_t *order, *starts;
  const float* rewards;
  int64_t count;
};

// Of one reward component in one group; computed by a warp, which raises rewards that are not
// finite.
struct RewardStats {
  bool finite, differ;
  double mean;
};
__device__ RewardStats reward_stats(const float* rewards, const int32_t* members, int n,
                                    int64_t components, int64_t component, const FaultFlag& fault) {
  const int lane = threadIdx.x % 32;
  double total = 0;
  float min = INFINITY, max = -INFINITY;
  int not_finite = 0;
  for (int i = lane; i < n; i += 32) {
    const int64_t at = members[i] * components + component;
    const float r = rewards[at];
    if (!(fabsf(r) < INFINITY)) {
      ptx::raise(fault, at, __float_as_uint(r));
      not_finite = 1;
    }
    min = fminf(min, r);
    max = fmaxf(max, r);
    total += r;
  }
  for (int step = 16; step > 0; step /= 2) {
    not_finite |= __shfl_xor_sync(kFull, not_finite, step);
    min = fminf(min, __shfl_xor_sync(kFull, min, step));
    max = fmaxf(max, __shfl_xor_sync(kFull, max, step));
  }
  total = warp_sum(total);
  return {not_finite == 0, max > min, total / n};
}

struct Advantages {
  Groups groups;
  const double *weights, *lengths;
  int64_t components;
  Estimator estimator;
  double epsilon;
  bool singleton_zero;
  double* out;
  FaultFlag fault;
};

__global__ void __launch_bounds__(kBlock) advantages_kernel(Advantages a) {
  const int64_t group = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (group >= a.groups.count) return;
  const int lane = threadIdx.x % 32;
  const int32_t* members = a.groups.order + a.groups.starts[group];
  const int n = a.groups.starts[group + 1] - a.groups.starts[group];
  const bool scaled = a.estimator == Estimator::grpo || a.estimator == Estimator::gdpo;
  for (int i = lane; i < n; i += 32) a.out[members[i]] = 0;
  for (int64_t k = 0; k < a.components; ++k) {
    const RewardStats s = reward_stats(a.groups.rewards, members, n, a.components, k, a.fault);
    const auto reward = [&](int i) {
      return static_cast<double>(a.groups.rewards[members[i] * a.components + k]);
    };
    double baseline = s.mean, divisor = 1;
    bool is_zero = !s.differ;
    if (!s.finite) {
      baseline = NAN;
      is_zero = false;
    } else if (n == 1) {
      baseline = 0;
      is_zero = a.singleton_zero;
      if (scaled) divisor = 1 + a.epsilon;
    } else if (scaled) {
      double squares = 0;
      for (int i = lane; i < n; i += 32) squares += (reward(i) - baseline) * (reward(i) - baseline);
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
      if (tokens > 0) baseline = weighted / tokens;
    }
    if (is_zero) continue;
    const double weight = a.weights[k];
    for (int i = lane; i < n; i += 32)
      a.out[members[i]] += weight * ((reward(i) - baseline) / divisor);
  }
}

__global__ void __launch_bounds__(kBlock)
    whiten_kernel(const double* values, const double* lengths, int64_t n, bool whiten, float* out) {
  SMEM_ARRAY(double, shared, kWarps);
  double mean = 0, scale = 1;
  if (whiten) {
    double tokens = 0, total = 0, squares = 0;
    for (int64_t i = threadIdx.x; i < n; i += kBlock) {
      tokens += lengths[i];
      total += lengths[i] * values[i];
    }
    tokens = block_sum<kWarps>(tokens, shared);
    mean = block_sum<kWarps>(total, shared) / (tokens + 1e-8);
    for (int64_t i = threadIdx.x; i < n; i += kBlock)
      squares += lengths[i] * (values[i] - mean) * (values[i] - mean);
    const double variance =
        block_sum<kWarps>(squares, shared) / (tokens + 1e-8) * tokens / (tokens - 1);
    scale = tokens > 1 ? 1 / sqrt(variance + 1e-8) : 0;
  }
  for (int64_t i = threadIdx.x; i < n; i += kBlock)
    out[i] = static_cast<float>(scale == 0 ? 0 : (values[i] - mean) * scale);
}

__global__ void __launch_bounds__(kBlock)
    informative_kernel(Groups groups, uint8_t* out, FaultFlag fault) {
  const int64_t group = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (group >= groups.count) return;
  const int lane = threadIdx.x % 32;
  const int32_t* members = groups.order + groups.starts[group];
  const int n = groups.starts[group + 1] - groups.starts[group];
  const RewardStats s = reward_stats(groups.rewards, members, n, 1, 0, fault);
  for (int i = lane; i < n; i += 32) out[members[i]] = s.finite && (s.differ || n == 1);
}

unsigned warp_blocks(int64_t groups) { return static_cast<unsigned>(ceil_div(groups, kWarps)); }

}  // namespace

void group_advantages(const GroupAdvantagesArgs& a, Device& device) {
  const int64_t n = a.advantages.size();
  if (!n) return;
  const GroupIndex index = index_groups(a.groups);
  Advantages r;
  const int64_t* cu_seqlens = nullptr;
  double* lengths = nullptr;
  const ScratchWorkspace scratch(device, [&](Workspace& workspace) {
    r.groups = {upload(device, workspace, index.order), upload(device, workspace, index.starts),
                a.rewards.as<const float>(), index.count()};
    r.weights = upload(device, workspace, a.weights);
    if (a.mask) {
      cu_seqlens = upload(device, workspace, a.cu_seqlens);
      r.lengths = lengths = workspace.take<double>(n);
    } else {
      r.lengths =
          upload(device, workspace, std::vector<double>(a.lengths.begin(), a.lengths.end()));
    }
    r.out = workspace.take<double>(n);
  });
  if (a.mask)
    launch(count_kept_kernel, static_cast<unsigned>(n), kBlock, 0, stream_of(device),
           a.mask.as<const uint8_t>(), cu_seqlens, lengths, a.fault);
  r.components = static_cast<int64_t>(a.weights.size());
  r.estimator = a.estimator;
  r.epsilon = a.epsilon;
  r.singleton_zero = a.singleton_zero;
  r.fault = a.fault;
  launch(advantages_kernel, warp_blocks(index.count()), kBlock, 0, stream_of(device), r);
  launch(whiten_kernel, 1u, kBlock, 0, stream_of(device), static_cast<const double*>(r.out),
         r.lengths, n, whitens(a.estimator), a.advantages.as<float>());
}

void informative_groups(const InformativeGroupsArgs& a, Device& device) {
  if (!a.informative.size()) return;
  const GroupIndex index = index_groups(a.groups);
  Groups groups;
  const ScratchWorkspace scratch(device, [&](Workspace& workspace) {
    groups = {upload(device, workspace, index.order), upload(device, workspace, index.starts),
              a.rewards.as<const float>(), index.count()};
  });
  launch(informative_kernel, warp_blocks(index.count()), kBlock, 0, stream_of(device), groups,
         a.informative.as<uint8_t>(), a.fault);
}

}  // namespace p2r::cuda

// Log-probabilities and the policy loss under a linear head, in chunks of rows. On tensor cores
// (cuda/gemm/gemm.cuh) the epilogue of the logits' GEMM keeps an online softmax of each row over
// spans of the vocabulary, and logits are stored only for a backward pass; that computes dz, scaled
// and in 16 bits, for the two other GEMMs. Otherwise a chunk's logits are stored in f32, the
// kernels of log_probs.cu read them, and dz overwrites them. The policy loss is forward and
// backward chunk by chunk, with the kernels of policy_loss.cu between for the log-probabilities'
// gradients.
//
// What the gradient costs beside its GEMMs, [16384, 2560] x [151936, 2560] on an H200: a chunk of
// 1024 rows writes and reads 0.62 GB of logits, writes 0.31 GB of dz and reads it twice, and reads
// and writes 1.56 GB of dweight, 5 GB in all: 1.2 ms, most of it overlapped with 3.6 ms of GEMMs at
// 660 TFLOP/s. Not overlapped are the pass from logits to dz, 0.22 ms, and what the epilogue waits
// for dweight's loads, some 5000 of the 21 000 cycles of a tile with k = 1024, 0.25 ms. Predicted
// for linear_policy_loss: 16 x 4.1 = 66 ms, against a lower bound of 48 (6 NVC at 790 TFLOP/s). The
// goal is 60: TMA multicast between two blocks (cuda/gemm/wgmma.cuh) would bring the GEMMs to 3.3
// ms.
#include "cuda/linear_head.cuh"
#include "cuda/log_probs.cuh"
#include "cuda/workspace.h"
#include "ops/linear_log_probs.h"

namespace p2r::cuda {

void token_log_probs(const TokenLogProbsArgs& a, Device& device);
void token_log_probs_backward(const TokenLogProbsBackwardArgs& a, Device& device);
void policy_loss(const PolicyLossArgs& a, Device& device);

namespace {

// The epilogue of the logits' GEMM (cuda/gemm/tiles.cuh): each row's online softmax over the
// columns of a span, the target's logit, and optionally the logits. Which lane sums which column,
// and when, depends on the column alone.
struct LogitsEpilogue {
  gemm_tiles::StoreEpilogue<float> store;  // stores nothing if store.c is null
  Bias bias;
  const int32_t* targets;
  float* target_logits;      // [m]
  SoftmaxPartial* partials;  // [m, spans]
  int64_t spans;
  float inv_temperature;
  SoftmaxExtra extra;

  struct State {
    SoftmaxPartial row[2];
  };

  __device__ __forceinline__ void begin(State& state) const {
    state.row[0] = state.row[1] = {-INFINITY, 0, 0};
  }

  template <int count>
  __device__ __forceinline__ void tile(State& state, float (&z)[count],
                                       const gemm_tiles::FragmentCoord& at) const {
    const int64_t remaining = store.n - at.column;
    const int left = remaining < 2 * count ? static_cast<int>(remaining) : 2 * count;
    if (bias.data) {
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const int j = 8 * (i / 4) + i % 2;
        if (j < left) z[i] += bias[at.column + j];
      }
    }
    if (store.c) {
      gemm_tiles::StoreEpilogue<float>::State none;
      store.tile(none, z, at);
    }
    if (left < 2 * count) {
#pragma unroll
      for (int i = 0; i < count; ++i)
        if (8 * (i / 4) + i % 2 >= left) z[i] = -INFINITY;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = at.row + 8 * half;
      const int64_t target = row < store.m ? targets[row] - at.column : -1;
      if (target >= 0 && target < left) {
#pragma unroll
        for (int i = 2 * half; i < count; i += i % 2 ? 3 : 1)
          if (8 * (i / 4) + i % 2 == target) target_logits[row] = z[i];
      }
      SoftmaxPartial& own = state.row[half];
      float max = own.max;
#pragma unroll
      for (int g = 0; g < count; g += 4)
        max = fmaxf(max, fmaxf(z[g + 2 * half], z[g + 2 * half + 1]));
      if (max > own.max) rescale(own, max, inv_temperature, extra);
      own.max = max;
      const float reference = max == -INFINITY ? 0 : max;
      // Two sums, for two independent chains of additions.
      float sum[2] = {0, 0};
      if (extra == SoftmaxExtra::none) {
        const float scale_log2 = inv_temperature * kLog2e;
#pragma unroll
        for (int g = 0; g < count; g += 4)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            sum[e] += ptx::ex2((z[g + 2 * half + e] - reference) * scale_log2);
      } else {
        float further[2] = {0, 0};
        const auto sum_both = [&](const auto& factor) {
#pragma unroll
          for (int g = 0; g < count; g += 4)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const float d = (z[g + 2 * half + e] - reference) * inv_temperature,
                          p = ptx::ex2(d * kLog2e);
              sum[e] += p;
              further[e] += p * factor(d, p);
            }
        };
        if (extra == SoftmaxExtra::moment)
          sum_both([](float d, float) { return fmaxf(d, -128.0f); });
        else
          sum_both([](float, float p) { return p; });
        own.extra += further[0] + further[1];
      }
      own.sum += sum[0] + sum[1];
    }
  }

  __device__ __forceinline__ void end(State& state, const gemm_tiles::FragmentCoord& at) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = at.row + 8 * half;
      merge_lanes(state.row[half], 4, inv_temperature,
                  extra);  // of the four lanes that share the row
      if (threadIdx.x % 4 == 0 && row < store.m) partials[row * spans + at.span] = state.row[half];
    }
  }
};

// The head with what its log-probabilities take.
template <class T, class Args>
class ChunkedHead : public LinearHead<T, Args> {
  using Base = LinearHead<T, Args>;
  using Base::a_, Base::channels_, Base::chunk_, Base::columns_, Base::device_, Base::first_,
      Base::tensor_cores_;

 public:
  ChunkedHead(const Args& a, Device& device, bool logits, bool gradient)
      : Base(a, device, logits, 1, gradient),
        target_logits_(device, tensor_cores_ ? this->template chunk_bytes<float>(1) : 0),
        partials_(device, tensor_cores_ ? this->template chunk_bytes<SoftmaxPartial>(kSpans) : 0) {}

  // Computes the chunk's log-probabilities, stats and entropy, into the outputs of `args`, and the
  // logits.
  void forward(TokenLogProbsArgs& args) {
    args.targets = this->chunk_of(a_.targets);
    args.temperature = a_.temperature;
    args.fault = a_.fault.from(first_);
    if constexpr (ptx::is_half<T>) {
      if (tensor_cores_) return forward_on_tensor_cores(args);
    }
    this->compute_logits();
    args.logits = f32_tensor<In>(this->logits(), {chunk_, columns_});
    token_log_probs(args, device_);
  }

  // The gradients of hidden, weight and bias from the chunk's logits, and its stats and gradients
  // in `args`.
  void backward(TokenLogProbsBackwardArgs& args) {
    const Shape shape = {chunk_, columns_};
    Device& device = device_;
    args.logits = f32_tensor<In>(this->logits(), shape);
    args.targets = this->chunk_of(a_.targets);
    args.temperature = a_.temperature;
    args.fault = a_.fault.from(first_);
    const RowGradients gradients = {args.targets.as<const int32_t>(), nullptr,
                                    args.d_log_probs.as<const float>(),
                                    args.d_entropy.as<const float>()};
    Base::template backward<9>(gradients, [&]<class D>(D* dz, int64_t stride, const float* scale) {
      if constexpr (ptx::is_half<D>) {
        scaled_logit_gradient(args, scale, dz, stride, device);
      } else {
        args.d_logits = f32_tensor<Out>(dz, shape);
        token_log_probs_backward(args, device);
      }
    });
  }

 private:
  static constexpr int64_t kSpans = 128;

  void forward_on_tensor_cores(const TokenLogProbsArgs& args) {
    const int64_t spans = std::min(kSpans, ceil_div(columns_, tile_columns(device_)));
    multiply_tiles<Major::k, Major::k>(
        device_, chunk_, columns_, channels_, this->hidden_rows(first_), this->weight(), spans, 1,
        LogitsEpilogue{{this->logits(), chunk_, columns_, columns_, 0, false, {}, nullptr},
                       {a_.bias.data, a_.bias.dtype},
                       args.targets.as<const int32_t>(),
                       target_logits_.template as<float>(),
                       partials_.template as<SoftmaxPartial>(),
                       spans,
                       static_cast<float>(1 / a_.temperature),
                       extra_of(args)});
    finish_log_probs(args, columns_, partials_.template as<const SoftmaxPartial>(), spans,
                     target_logits_.template as<const float>(), device_);
  }

  const Scratch target_logits_, partials_;
};

}  // namespace

void linear_log_probs(const LinearLogProbsArgs& a, Device& device) {
  if (!a.hidden.shape[0]) return;
  with_float_type(a.hidden.dtype, [&](auto* t) {
    ChunkedHead<std::remove_pointer_t<decltype(t)>, LinearLogProbsArgs> c(a, device, false, false);
    c.for_each_chunk([&] {
      TokenLogProbsArgs args;
      args.log_probs = c.chunk_of(a.log_probs);
      args.stats = c.chunk_of(a.stats);
      args.entropy = c.chunk_of(a.entropy);
      args.squared_probs = c.chunk_of(a.squared_probs);
      c.forward(args);
    });
  });
}

void linear_log_probs_backward(const LinearLogProbsBackwardArgs& a, Device& device) {
  if (!a.hidden.shape[0]) return zero_gradients(a, device);
  with_float_type(a.hidden.dtype, [&](auto* t) {
    ChunkedHead<std::remove_pointer_t<decltype(t)>, LinearLogProbsBackwardArgs> c(a, device, true,
                                                                                  true);
    c.for_each_chunk([&] {
      c.compute_logits();
      TokenLogProbsBackwardArgs args;
      args.stats = c.chunk_of(a.stats);
      args.d_log_probs = c.chunk_of(a.d_log_probs);
      args.entropy = c.chunk_of(a.entropy);
      args.d_entropy = c.chunk_of(a.d_entropy);
      c.backward(args);
    });
  });
}

void linear_policy_loss(const LinearPolicyLossArgs& a, Device& device) {
  const int64_t rows = a.hidden.shape[0];
  const bool with_entropy = a.loss.entropy_coef != 0;
  Out stats, entropy;
  PolicyLossArgs loss = a.loss;
  const ScratchWorkspace scratch(device, [&](Workspace& workspace) {
    // Room for one token at least: a null tensor would be an absent one.
    const int64_t tokens = std::max<int64_t>(rows, 1);
    stats = f32_tensor<Out>(workspace.take<float>(2 * tokens), {rows, 2});
    loss.d_log_probs = f32_tensor<Out>(workspace.take<float>(tokens), {rows});
    if (!with_entropy) return;
    entropy = f32_tensor<Out>(workspace.take<float>(tokens), {rows});
    loss.d_entropy = f32_tensor<Out>(workspace.take<float>(tokens), {rows});
  });
  loss.fault = a.fault;
  loss.log_probs = view_as<In>(a.log_probs);
  loss.entropy = view_as<In>(entropy);
  if (!rows) {
    policy_loss(loss, device);
    return zero_gradients(a, device);
  }
  device.zero(a.log_probs.data, a.log_probs.bytes());
  if (entropy) device.zero(entropy.data, entropy.bytes());
  with_float_type(a.hidden.dtype, [&](auto* t) {
    ChunkedHead<std::remove_pointer_t<decltype(t)>, LinearPolicyLossArgs> c(a, device, true, true);
    c.for_each_chunk([&] {
      TokenLogProbsArgs forward;
      forward.log_probs = c.chunk_of(a.log_probs);
      forward.stats = c.chunk_of(stats);
      forward.entropy = c.chunk_of(entropy);
      c.forward(forward);
      // A token's gradient depends on its own log-probability alone, so this chunk's are final; the
      // loss is final after the last chunk.
      policy_loss(loss, device);
      TokenLogProbsBackwardArgs backward;
      backward.stats = view_as<In>(forward.stats);
      backward.d_log_probs = view_as<In>(c.chunk_of(loss.d_log_probs));
      backward.entropy = view_as<In>(forward.entropy);
      backward.d_entropy = view_as<In>(c.chunk_of(loss.d_entropy));
      c.backward(backward);
    });
  });
}

}  // namespace p2r::cuda

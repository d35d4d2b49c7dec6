// What a training step does with its gradients, all tensors in one call.
//
// clip_grad_norm, as torch.nn.utils.clip_grad_norm_ has it:
//   norm = √(Σ g² over all gradients),   g *= min(1, max_norm / (norm + 1e-6))
// A max_norm of the largest double is no limit: gradients stay as they are, finite or not. Else a
// gradient that is not finite makes norm infinite or NaN; the factor is then 0 or NaN, so that
// what is finite becomes 0 or NaN and the rest NaN. norm: f32 [1], of the gradients before.
// Squares are summed in f64, over blocks of kNormBlock elements of one tensor, and the blocks in
// order: the result does not depend on the thread count.
//
// adam_w, the step of AdamW (Loshchilov and Hutter, 2019) as torch.optim.AdamW takes it:
//   p -= lr weight_decay p
//   m += (1 - beta1) (g - m),   v = beta2 v + (1 - beta2) g²
//   p -= lr / (1 - beta1^step) · m / (√v / √(1 - beta2^step) + eps)
// params f32 | f16 | bf16; grads in the parameter's shape, in its type or f32; moments f32 [2,
// size] hold m and v. f32 arithmetic; a half parameter is rounded once a step. step counts from 1.
//
// Tensors that are written must not overlap. No tensors, or tensors of size 0, are fine.
#pragma once
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "ops/tensor.h"

namespace p2r {

constexpr int64_t kNormBlock = 16384;

struct ClipGradNormArgs {
  std::vector<InOut> grads;
  double max_norm = 1;
  Out norm;
  auto fields() { return std::tie(grads, max_norm, norm); }
};

struct AdamWArgs {
  std::vector<InOut> params;
  std::vector<In> grads;
  std::vector<InOut> moments;
  int64_t step = 1;
  double lr = 0, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0.01;
  auto fields() {
    return std::tie(params, grads, moments, step, lr, beta1, beta2, eps, weight_decay);
  }
};

// The step's constants, in f64 until here. Plain, so that kernels take it as a parameter.
struct AdamStep {
  float keep;  // 1 - lr weight_decay
  float beta2;
  float one_minus_beta1, one_minus_beta2;
  float rate;  // lr / (1 - beta1^step)
  float root;  // 1 / √(1 - beta2^step)
  float eps;
};

inline AdamStep adam_step(const AdamWArgs& a) {
  const double step = static_cast<double>(a.step);
  return {static_cast<float>(1 - a.lr * a.weight_decay),
          static_cast<float>(a.beta2),
          static_cast<float>(1 - a.beta1),
          static_cast<float>(1 - a.beta2),
          static_cast<float>(a.lr / (1 - std::pow(a.beta1, step))),
          static_cast<float>(1 / std::sqrt(1 - std::pow(a.beta2, step))),
          static_cast<float>(a.eps)};
}

// The factor that clips; NaN stays NaN.
constexpr double clip_factor(double max_norm, double norm) {
  if (max_norm == std::numeric_limits<double>::max()) return 1;
  const double factor = max_norm / (norm + 1e-6);
  return factor > 1 ? 1 : factor;
}

}  // namespace p2r

// Arguments and results shared by log-probabilities of stored logits and of a linear head.
#pragma once
#include "binding/op.h"

namespace p2r::binding {

constexpr double kMinTemperature = 1e-6, kMaxTemperature = 1e6;

// One target for each row of `rows`.
inline In read_targets(Call& call, const In& rows) {
  const In targets = call.in("targets", kI32, 1);
  call.same_shape("targets", targets, {rows.shape[0]});
  return targets;
}

// Inputs of the gradient of n rows; the entropy is used only where its gradient is given.
template <class Args>
void read_row_gradients(Call& call, Args& a, int64_t n) {
  a.stats = call.in("stats", kF32, 2);
  a.d_log_probs = call.in("dLogProbs", kF32, 1);
  a.entropy = call.maybe_in("entropy", kF32, 1);
  a.d_entropy = call.maybe_in("dEntropy", kF32, 1);
  call.same_shape("stats", a.stats, {n, 2});
  call.same_shape("dLogProbs", a.d_log_probs, {n});
  call.check(!a.d_entropy || a.entropy, Code::value, "dEntropy needs entropy");
  if (a.d_entropy) {
    call.same_shape("entropy", a.entropy, {n});
    call.same_shape("dEntropy", a.d_entropy, {n});
  } else {
    a.entropy = In{};
  }
}

// Reads whether the entropy or the squared probabilities of n rows are wanted, and makes these
// results after the log-probabilities and their stats.
template <class Args>
void log_prob_results(Call& call, Args& a, int64_t n) {
  const bool entropy = call.flag("entropy"), squared = call.flag("squaredProbs");
  call.check(!entropy || !squared, Code::value,
             "entropy and squaredProbs are sums over the vocabulary of which a call has one; call "
             "it twice");
  a.log_probs = call.result(DType::f32, {n});
  a.stats = call.result(DType::f32, {n, 2});
  if (entropy) a.entropy = call.result(DType::f32, {n});
  if (squared) a.squared_probs = call.result(DType::f32, {n});
}

}  // namespace p2r::binding

#include "ops/linear_log_probs.h"

#include <string>

#include "binding/log_probs.h"
#include "binding/policy_loss.h"

namespace p2r::binding {

namespace {

// Reads hidden [N, C], weight [V, C], bias [V] or none, targets [N] and the temperature, in this
// order.
template <class Args>
void read_head(Call& call, Args& a) {
  a.hidden = call.in("hidden", kFloats, 2);
  a.weight = call.in("weight", kFloats, 2);
  a.bias = call.maybe_in("bias", kFloats, 1);
  a.targets = read_targets(call, a.hidden);
  a.temperature = call.number("temperature", kMinTemperature, kMaxTemperature);
  call.same_dtype("weight", a.weight, a.hidden.dtype);
  call.check(a.weight.shape[1] == a.hidden.shape[1], Code::shape,
             "weight must have as many columns as hidden, " + std::to_string(a.hidden.shape[1]) +
                 ", got " + to_string(a.weight.shape));
  if (a.bias) {
    call.check(a.bias.dtype == a.hidden.dtype || a.bias.dtype == DType::f32, Code::dtype,
               "bias must be f32 or as hidden, " + std::string(p2r::to_string(a.hidden.dtype)) +
                   ", got " + p2r::to_string(a.bias.dtype));
    call.same_shape("bias", a.bias, {a.weight.shape[0]});
  }
}

template <class Args>
void read_accumulators(Call& call, Args& a) {
  a.into_weight = call.maybe_inout("into.dWeight", kF32, 2);
  a.into_bias = call.maybe_inout("into.dBias", kF32, 1);
  if (a.into_weight) call.same_shape("into.dWeight", a.into_weight, a.weight.shape);
  if (a.into_bias) {
    call.check(bool(a.bias), Code::value, "into.dBias needs a bias");
    call.same_shape("into.dBias", a.into_bias, {a.weight.shape[0]});
  }
}

template <class Args>
void gradient_results(Call& call, Args& a) {
  a.d_hidden = call.result(a.hidden.dtype, a.hidden.shape);
  if (!a.into_weight) a.d_weight = call.result(DType::f32, a.weight.shape);
  if (a.bias && !a.into_bias) a.d_bias = call.result(DType::f32, {a.weight.shape[0]});
}

}  // namespace

Napi::Value linear_log_probs(Call& call) {
  LinearLogProbsArgs a;
  read_head(call, a);
  const bool entropy = call.flag("entropy");
  log_prob_results(call, a, a.hidden.shape[0], entropy);
  return call.run(&Kernels::linear_log_probs, a);
}

Napi::Value linear_log_probs_backward(Call& call) {
  LinearLogProbsBackwardArgs a;
  read_head(call, a);
  read_row_gradients(call, a, a.hidden.shape[0]);
  read_accumulators(call, a);
  gradient_results(call, a);
  return call.run(&Kernels::linear_log_probs_backward, a);
}

Napi::Value linear_policy_loss(Call& call) {
  LinearPolicyLossArgs a;
  read_head(call, a);
  read_policy_loss(call, a.loss, a.hidden.shape[0]);
  call.check(!by_sequence(a.loss.objective), Code::value,
             "objective must not be 'gspo', 'luspo', 'gmpo' or 'vespo', whose ratios need all of a "
             "sequence: use linearLogProbs, policyLoss and linearLogProbsBackward");
  call.check(!by_covariance(a.loss.objective) && a.loss.top_entropy == 1, Code::value,
             "objective must not be 'clip_cov' or 'kl_cov', nor topEntropyQuantile below 1, which "
             "need all tokens of a batch: use linearLogProbs, policyLoss and "
             "linearLogProbsBackward");
  read_accumulators(call, a);
  a.log_probs = call.result(DType::f32, {a.hidden.shape[0]});
  policy_loss_results(call, a.loss);
  gradient_results(call, a);
  return call.run(&Kernels::linear_policy_loss, a);
}

}  // namespace p2r::binding

#include "ops/linear_log_probs.h"

#include "binding/linear_head.h"
#include "binding/policy_loss.h"

namespace p2r::binding {

namespace {

// Reads the head, targets [N] and the temperature, in this order.
template <class Args>
void read_head(Call& call, Args& a) {
  read_linear_head(call, a.hidden, a.weight, a.bias);
  a.targets = read_targets(call, a.hidden);
  a.temperature = call.number("temperature", kMinTemperature, kMaxTemperature);
}

}  // namespace

Napi::Value linear_log_probs(Call& call) {
  LinearLogProbsArgs a;
  read_head(call, a);
  log_prob_results(call, a, a.hidden.shape[0]);
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

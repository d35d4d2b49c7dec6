#include "binding/policy_loss.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace p2r::binding {

// An option that is `false` is passed as null.
void read_policy_loss(Call& call, PolicyLossArgs& a, int64_t tokens) {
  const auto per_token = [&](const char* name) {
    In t = call.maybe_in(name, kF32, 1);
    if (t) call.same_shape(name, t, {tokens});
    return t;
  };
  a.old_log_probs = per_token("oldLogProbs");
  a.ref_log_probs = per_token("refLogProbs");
  a.importance_weights = per_token("importanceWeights");
  a.advantages = call.in("advantages", kF32, 1);
  a.mask = call.maybe_in("mask", kU8, 1);
  if (a.mask) call.same_shape("mask", a.mask, {tokens});
  a.cu_seqlens = call.cu_seqlens("cuSeqlens", tokens);
  const int64_t sequences = static_cast<int64_t>(a.cu_seqlens.size()) - 1;

  const int64_t given = a.advantages.shape[0];
  if (call.given()) {
    a.per_token = call.flag("advantagesPer");
    call.check(
        given == (a.per_token ? tokens : sequences), Code::shape,
        "advantages must have one value a " + std::string(a.per_token ? "token, " : "sequence, ") +
            std::to_string(a.per_token ? tokens : sequences) + ", got " + std::to_string(given));
  } else {
    call.check(given == sequences || given == tokens, Code::shape,
               "advantages must have one value a sequence, " + std::to_string(sequences) +
                   ", or a token, " + std::to_string(tokens) + ", got " + std::to_string(given));
    a.per_token = given != sequences;
  }

  a.objective = call.choice("objective", kObjectives);
  a.clip_low = call.number("clipLow", 0, INFINITY);
  a.clip_high = call.number("clipHigh", 0, INFINITY);
  a.dual_clip = call.given() ? call.number("dualClip", 1, INFINITY) : 0;
  a.delta = call.given() ? call.number("delta", 1e-30, INFINITY) : 0;
  a.tau_positive = call.number("tauPositive", 1e-6, INFINITY);
  a.tau_negative = call.number("tauNegative", 1e-6, INFINITY);
  a.k_positive = call.number("vespoKPositive", 0, INFINITY);
  a.lambda_positive = call.number("vespoLambdaPositive", 1e-4, INFINITY);
  a.k_negative = call.number("vespoKNegative", 0, INFINITY);
  a.lambda_negative = call.number("vespoLambdaNegative", 1e-4, INFINITY);
  a.kl = call.choice("kl", kKls);
  a.kl_unbiased = call.flag("klUnbiased");
  a.kl_coef = call.number("klCoef", -INFINITY, INFINITY);
  a.kl_clamp = call.given() ? call.number("klClamp", 1e-30, INFINITY) : 0;
  a.entropy_coef = call.number("entropyCoef", -INFINITY, INFINITY);
  a.aggregation = call.choice("aggregation", kAggregations);
  a.term_aggregation = call.choice("termAggregation", kAggregations);
  a.count_empty = call.flag("emptyRows");
  if (call.given()) {
    a.loss_scale = call.number("lossScale", 1e-30, INFINITY);
  } else {
    int64_t longest = 1;
    for (int64_t i = 0; i < sequences; ++i)
      longest = std::max(longest, a.cu_seqlens[i + 1] - a.cu_seqlens[i]);
    a.loss_scale = static_cast<double>(longest);
  }
  a.normalizer = call.given() ? call.number("normalizer", 1e-30, INFINITY) : 0;
  call.check(a.normalizer == 0 || a.aggregation != Aggregation::token_sum, Code::value,
             "normalizer must be absent with 'token-sum', which divides by nothing");
  call.check(a.kl == Kl::none || a.ref_log_probs, Code::value, "kl needs refLogProbs");
}

void policy_loss_results(Call& call, PolicyLossArgs& a) {
  a.loss = call.result(DType::f32, {1});
  a.metrics = call.result(DType::f32, {kLossMetrics});
}

Napi::Value policy_loss(Call& call) {
  PolicyLossArgs a;
  a.log_probs = call.in("logProbs", kF32, 1);
  const int64_t tokens = a.log_probs.shape[0];
  a.entropy = call.maybe_in("entropy", kF32, 1);
  if (a.entropy) call.same_shape("entropy", a.entropy, {tokens});
  read_policy_loss(call, a, tokens);
  call.check(a.entropy_coef == 0 || a.entropy, Code::value, "entropyCoef needs entropy");
  a.d_log_probs = call.result(DType::f32, {tokens});
  policy_loss_results(call, a);
  if (a.entropy) a.d_entropy = call.result(DType::f32, {tokens});
  return call.run(&Kernels::policy_loss, a);
}

}  // namespace p2r::binding

#include "binding/policy_loss.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace p2r::binding {

bool read_advantages_per(Call& call, const In& advantages, int64_t tokens, int64_t sequences) {
  const int64_t given = advantages.shape[0];
  if (call.given()) {
    const bool per_token = call.flag("advantagesPer");
    call.check(
        given == (per_token ? tokens : sequences), Code::shape,
        "advantages must have one value a " + std::string(per_token ? "token, " : "sequence, ") +
            std::to_string(per_token ? tokens : sequences) + ", got " + std::to_string(given));
    return per_token;
  }
  call.check(given == sequences || given == tokens, Code::shape,
             "advantages must have one value a sequence, " + std::to_string(sequences) +
                 ", or a token, " + std::to_string(tokens) + ", got " + std::to_string(given));
  return given != sequences;
}

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

  a.per_token = read_advantages_per(call, a.advantages, tokens, sequences);

  if (call.given()) {
    a.groups = call.ints("groups", INT32_MIN, UINT32_MAX);
    call.check(static_cast<int64_t>(a.groups.size()) == sequences, Code::shape,
               "groups must have one id a sequence, " + std::to_string(sequences) + ", got " +
                   std::to_string(a.groups.size()));
  }
  const bool grouped = !a.groups.empty() || sequences == 0;
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
  a.cov_ratio = call.number("covRatio", 1e-30, 1);
  a.cov_high = call.number("covHigh", -INFINITY, INFINITY);
  a.cov_low = call.number("covLow", -INFINITY, a.cov_high);
  a.cov_kl = call.number("covKlCoef", -INFINITY, INFINITY);
  a.cov_seed = call.integer("covSeed", 0, (int64_t{1} << 53) - 1);
  a.top_entropy = call.number("topEntropyQuantile", 1e-30, 1);
  a.kl = call.choice("kl", kKls);
  a.kl_unbiased = call.flag("klUnbiased");
  a.kl_coef = call.number("klCoef", -INFINITY, INFINITY);
  a.kl_clamp = call.given() ? call.number("klClamp", 1e-30, INFINITY) : 0;
  a.entropy_coef = call.number("entropyCoef", -INFINITY, INFINITY);
  a.aggregation = call.choice("aggregation", kAggregations);
  a.term_aggregation = call.choice("termAggregation", kAggregations);
  call.check(grouped || (a.aggregation != Aggregation::prompt_mean &&
                         a.term_aggregation != Aggregation::prompt_mean),
             Code::value, "'prompt-mean' needs groups");
  if (a.aggregation != Aggregation::prompt_mean && a.term_aggregation != Aggregation::prompt_mean)
    a.groups.clear();
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
  call.check(a.top_entropy == 1 || a.entropy, Code::value, "topEntropyQuantile needs entropy");
  call.check(!by_covariance(a.objective) || tokens <= UINT32_MAX, Code::value,
             "this objective takes at most 2^32 - 1 tokens");
  a.d_log_probs = call.result(DType::f32, {tokens});
  policy_loss_results(call, a);
  if (a.entropy) a.d_entropy = call.result(DType::f32, {tokens});
  return call.run(&Kernels::policy_loss, a);
}

Napi::Value apply_kl_penalty(Call& call) {
  ApplyKlPenaltyArgs a;
  a.rewards = call.in("rewards", kF32, 1);
  const int64_t sequences = a.rewards.shape[0];
  a.log_probs = call.in("logProbs", kF32, 1);
  const int64_t tokens = a.log_probs.shape[0];
  a.ref_log_probs = call.in("refLogProbs", kF32, 1);
  call.same_shape("refLogProbs", a.ref_log_probs, {tokens});
  a.mask = call.maybe_in("mask", kU8, 1);
  if (a.mask) call.same_shape("mask", a.mask, {tokens});
  a.cu_seqlens = call.cu_seqlens("cuSeqlens", tokens);
  call.check(static_cast<int64_t>(a.cu_seqlens.size()) == sequences + 1, Code::shape,
             "cuSeqlens must bound as many sequences as there are rewards, " +
                 std::to_string(sequences) + ", got " + std::to_string(a.cu_seqlens.size() - 1));
  a.kl = call.choice("kl", kKls);
  call.check(a.kl != Kl::none, Code::value, "kl must not be 'none'");
  a.kl_coef = call.number("klCoef", -INFINITY, INFINITY);
  a.kl_clamp = call.given() ? call.number("klClamp", 1e-30, INFINITY) : 0;
  a.out = call.result(DType::f32, {sequences});
  return call.run(&Kernels::apply_kl_penalty, a);
}

}  // namespace p2r::binding

#include "ops/log_probs.h"

#include "binding/log_probs.h"

namespace p2r::binding {

namespace {

template <class Args>
void read_logits(Call& call, Args& a) {
  a.logits = call.in("logits", kFloats, 2);
  a.targets = read_targets(call, a.logits);
}

}  // namespace

Napi::Value token_log_probs(Call& call) {
  TokenLogProbsArgs a;
  read_logits(call, a);
  a.temperature = call.number("temperature", kMinTemperature, kMaxTemperature);
  log_prob_results(call, a, a.logits.shape[0]);
  return call.run(&Kernels::token_log_probs, a);
}

Napi::Value token_log_probs_shard(Call& call) {
  TokenLogProbsShardArgs a;
  read_logits(call, a);
  a.vocab_offset = call.integer("vocabOffset", 0, INT32_MAX);
  a.temperature = call.number("temperature", kMinTemperature, kMaxTemperature);
  const bool entropy = call.flag("entropy");
  const int64_t n = a.logits.shape[0];
  a.stats = call.result(DType::f32, {n, 2});
  a.target_logit = call.result(DType::f32, {n});
  if (entropy) a.moment = call.result(DType::f32, {n});
  return call.run(&Kernels::token_log_probs_shard, a);
}

Napi::Value merge_log_probs(Call& call) {
  MergeLogProbsArgs a;
  a.stats = call.in_list("stats", kF32, 2);
  a.target_logit = call.in_list("targetLogit", kF32, 1);
  a.moment = call.in_list("moment", kF32, 1);
  call.check(!a.stats.empty(), Code::value, "at least one shard is needed");
  call.check(a.target_logit.size() == a.stats.size() &&
                 (a.moment.empty() || a.moment.size() == a.stats.size()),
             Code::value, "every shard needs the same parts");
  const int64_t n = a.stats[0].shape[0];
  for (const In& t : a.stats) call.same_shape("stats", t, {n, 2});
  for (const In& t : a.target_logit) call.same_shape("targetLogit", t, {n});
  for (const In& t : a.moment) call.same_shape("moment", t, {n});
  a.log_probs = call.result(DType::f32, {n});
  a.merged = call.result(DType::f32, {n, 2});
  if (!a.moment.empty()) a.entropy = call.result(DType::f32, {n});
  return call.run(&Kernels::merge_log_probs, a);
}

Napi::Value token_log_probs_backward(Call& call) {
  TokenLogProbsBackwardArgs a;
  const bool in_place = call.flag("inPlace");
  if (in_place)
    static_cast<View&>(a.logits) = call.inout("logits", kFloats, 2);
  else
    a.logits = call.in("logits", kFloats, 2);
  a.targets = read_targets(call, a.logits);
  read_row_gradients(call, a, a.logits.shape[0]);
  a.temperature = call.number("temperature", kMinTemperature, kMaxTemperature);
  a.shard = call.given();
  if (a.shard) a.vocab_offset = call.integer("vocabOffset", 0, INT32_MAX);
  if (in_place)
    static_cast<View&>(a.d_logits) = a.logits;
  else
    a.d_logits = call.result(a.logits.dtype, a.logits.shape);
  return call.run(&Kernels::token_log_probs_backward, a);
}

}  // namespace p2r::binding

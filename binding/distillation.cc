#include "ops/distillation.h"

#include <cmath>
#include <string>

#include "binding/linear_head.h"
#include "binding/policy_loss.h"

namespace p2r::binding {

namespace {

// Reads the mask, the divergence and its temperature, for `rows` rows.
template <class Args>
void read_options(Call& call, Args& a, int64_t rows) {
  a.mask = call.maybe_in("mask", kU8, 1);
  if (a.mask) call.same_shape("mask", a.mask, {rows});
  a.objective = call.choice("objective", kDivergences);
  a.beta = call.number("beta", 0, 1);
  call.check(a.objective != Divergence::jsd || (a.beta > 0 && a.beta < 1), Code::value,
             "beta must be between 0 and 1, exclusively: 0 is 'forward_kl', 1 'reverse_kl'");
  a.temperature = call.number("temperature", kMinTemperature, kMaxTemperature);
}

template <class Args>
void read_d_divergence(Call& call, Args& a, int64_t rows) {
  a.d_divergence = call.in("dDivergence", kF32, 1);
  call.same_shape("dDivergence", a.d_divergence, {rows});
}

template <class Args>
void read_teacher_logits(Call& call, Args& a) {
  a.teacher_logits = call.in("teacherLogits", kFloats, 2);
  call.same_dtype("teacherLogits", a.teacher_logits, a.logits.dtype);
  call.same_shape("teacherLogits", a.teacher_logits, a.logits.shape);
  read_options(call, a, a.logits.shape[0]);
}

template <class Args>
void read_heads(Call& call, Args& a) {
  read_linear_head(call, a.hidden, a.weight, a.bias);
  read_linear_head(call, a.teacher_hidden, a.teacher_weight, a.teacher_bias,
                   {"teacherHidden", "teacherWeight", "teacherBias"});
  const auto same_size = [&](const char* name, const View& teacher, const View& student,
                             const char* what) {
    call.check(teacher.shape[0] == student.shape[0], Code::shape,
               std::string(name) + " must have as many rows as " + what + ", " +
                   std::to_string(student.shape[0]) + ", got " + to_string(teacher.shape));
  };
  same_size("teacherHidden", a.teacher_hidden, a.hidden, "hidden");
  same_size("teacherWeight", a.teacher_weight, a.weight, "weight");
  read_options(call, a, a.hidden.shape[0]);
}

}  // namespace

Napi::Value distillation(Call& call) {
  DistillationArgs a;
  a.logits = call.in("logits", kFloats, 2);
  read_teacher_logits(call, a);
  a.divergence = call.result(DType::f32, {a.logits.shape[0]});
  return call.run(&Kernels::distillation, a);
}

Napi::Value distillation_backward(Call& call) {
  DistillationBackwardArgs a;
  const bool in_place = call.flag("inPlace");
  if (in_place)
    static_cast<View&>(a.logits) = call.inout("logits", kFloats, 2);
  else
    a.logits = call.in("logits", kFloats, 2);
  read_teacher_logits(call, a);
  read_d_divergence(call, a, a.logits.shape[0]);
  a.divergence = call.result(DType::f32, {a.logits.shape[0]});
  if (in_place)
    static_cast<View&>(a.d_logits) = a.logits;
  else
    a.d_logits = call.result(a.logits.dtype, a.logits.shape);
  return call.run(&Kernels::distillation_backward, a);
}

Napi::Value linear_distillation(Call& call) {
  LinearDistillationArgs a;
  read_heads(call, a);
  a.divergence = call.result(DType::f32, {a.hidden.shape[0]});
  return call.run(&Kernels::linear_distillation, a);
}

Napi::Value linear_distillation_backward(Call& call) {
  LinearDistillationBackwardArgs a;
  read_heads(call, a);
  read_d_divergence(call, a, a.hidden.shape[0]);
  read_accumulators(call, a);
  a.divergence = call.result(DType::f32, {a.hidden.shape[0]});
  gradient_results(call, a);
  return call.run(&Kernels::linear_distillation_backward, a);
}

Napi::Value distillation_advantages(Call& call) {
  DistillationAdvantagesArgs a;
  a.log_probs = call.in("logProbs", kF32, 1);
  const int64_t tokens = a.log_probs.shape[0];
  a.teacher_log_probs = call.in("teacherLogProbs", kF32, 1);
  call.same_shape("teacherLogProbs", a.teacher_log_probs, {tokens});
  a.cu_seqlens = call.cu_seqlens("cuSeqlens", tokens);
  a.mask = call.maybe_in("mask", kU8, 1);
  if (a.mask) call.same_shape("mask", a.mask, {tokens});
  a.base = call.maybe_in("advantages", kF32, 1);
  if (a.base) {
    const int64_t sequences = static_cast<int64_t>(a.cu_seqlens.size()) - 1;
    a.per_token = read_advantages_per(call, a.base, tokens, sequences);
  } else {
    call.check(!call.given(), Code::value, "advantagesPer needs advantages");
  }
  a.coef = call.number("coef", 0, INFINITY);
  a.discount = call.number("discount", 0, 1);
  if (call.given()) a.clamp = call.number("clamp", 1e-30, INFINITY);
  a.advantages = call.result(DType::f32, {tokens});
  return call.run(&Kernels::distillation_advantages, a);
}

}  // namespace p2r::binding

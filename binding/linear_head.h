// Arguments and results shared by operations on linear heads.
#pragma once
#include <string>

#include "binding/log_probs.h"

namespace p2r::binding {

struct HeadNames {
  const char *hidden = "hidden", *weight = "weight", *bias = "bias";
};

// Reads hidden [N, C], weight [V, C] and bias [V] or none, in this order.
inline void read_linear_head(Call& call, In& hidden, In& weight, In& bias,
                             const HeadNames& names = {}) {
  hidden = call.in(names.hidden, kFloats, 2);
  weight = call.in(names.weight, kFloats, 2);
  bias = call.maybe_in(names.bias, kFloats, 1);
  const std::string of_hidden = names.hidden;
  call.same_dtype(names.weight, weight, hidden.dtype);
  call.check(weight.shape[1] == hidden.shape[1], Code::shape,
             std::string(names.weight) + " must have as many columns as " + of_hidden + ", " +
                 std::to_string(hidden.shape[1]) + ", got " + to_string(weight.shape));
  if (!bias) return;
  call.check(bias.dtype == hidden.dtype || bias.dtype == DType::f32, Code::dtype,
             std::string(names.bias) + " must be f32 or as " + of_hidden + ", " +
                 p2r::to_string(hidden.dtype) + ", got " + p2r::to_string(bias.dtype));
  call.same_shape(names.bias, bias, {weight.shape[0]});
}

// Reads the tensors into which the gradients of weight and bias are added, or none.
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

}  // namespace p2r::binding

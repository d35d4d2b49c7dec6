#include "ops/linear.h"

#include "binding/op.h"

namespace p2r::binding {

namespace {

// x [..., C], weight [F, C] and bias [F] or none, read in this order.
template <class Args>
In read_layer(Call& call, Args& a) {
  a.x = call.in("x", kFloats);
  a.weight = call.in("weight", kFloats, 2);
  const In bias = call.maybe_in("bias", kFloats, 1);
  call.check(a.x.shape.rank >= 1, Code::shape, "x must have at least 1 axis, got []");
  call.same_dtype("weight", a.weight, a.x.dtype);
  call.check(a.weight.shape[1] == a.x.shape[-1], Code::shape,
             "weight must have as many columns as x's last axis, " + std::to_string(a.x.shape[-1]) +
                 ", got " + to_string(a.weight.shape));
  if (bias) {
    call.check(bias.dtype == a.x.dtype || bias.dtype == DType::f32, Code::dtype,
               "bias must be f32 or as x, " + std::string(p2r::to_string(a.x.dtype)) + ", got " +
                   p2r::to_string(bias.dtype));
    call.same_shape("bias", bias, {a.weight.shape[0]});
  }
  return bias;
}

Shape with_features(Shape shape, int64_t features) {
  shape.dim[shape.rank - 1] = features;
  return shape;
}

}  // namespace

Napi::Value linear(Call& call) {
  LinearArgs a;
  a.bias = read_layer(call, a);
  const bool unrounded = call.flag("dtype");
  a.out =
      call.result(unrounded ? DType::f32 : a.x.dtype, with_features(a.x.shape, a.weight.shape[0]));
  return call.run(&Kernels::linear, a);
}

Napi::Value linear_backward(Call& call) {
  LinearBackwardArgs a;
  a.d_out = call.in("dOut", kFloats);
  const In bias = read_layer(call, a);
  a.into_weight = call.maybe_inout("into.dWeight", kF32, 2);
  a.into_bias = call.maybe_inout("into.dBias", kF32, 1);
  const Shape features = {a.weight.shape[0]};
  call.same_dtype("dOut", a.d_out, a.x.dtype);
  call.same_shape("dOut", a.d_out, with_features(a.x.shape, features[0]));
  if (a.into_weight) call.same_shape("into.dWeight", a.into_weight, a.weight.shape);
  if (a.into_bias) {
    call.check(bool(bias), Code::value, "into.dBias needs a bias");
    call.same_shape("into.dBias", a.into_bias, features);
  }
  a.d_x = call.result(a.x.dtype, a.x.shape);
  if (!a.into_weight) a.d_weight = call.result(DType::f32, a.weight.shape);
  if (bias && !a.into_bias) a.d_bias = call.result(DType::f32, features);
  return call.run(&Kernels::linear_backward, a);
}

}  // namespace p2r::binding

#include "ops/layer_norm.h"

#include "binding/op.h"

namespace p2r::binding {

namespace {

Shape rows_of(const Call& call, const View& x) {
  call.check(x.shape.rank >= 1, Code::shape, "x must have at least 1 axis, got []");
  int64_t rows = 1;
  for (int i = 0; i + 1 < x.shape.rank; ++i) rows *= x.shape.dim[i];
  return {rows, 2};
}

}  // namespace

Napi::Value layer_norm(Call& call) {
  LayerNormArgs a;
  a.x = call.in("x", kFloats);
  a.weight = call.in("weight", kFloats);
  a.bias = call.in("bias", kFloats);
  a.eps = call.number("eps", 0, 1e30);
  const Shape stats = rows_of(call, a.x);
  call.same_dtype("weight", a.weight, a.x.dtype);
  if (a.bias.dtype != DType::f32) call.same_dtype("bias", a.bias, a.x.dtype);
  call.same_shape("weight", a.weight, {a.x.shape[-1]});
  call.same_shape("bias", a.bias, {a.x.shape[-1]});
  a.out = call.result(a.x.dtype, a.x.shape);
  a.stats = call.result(DType::f32, stats);
  return call.run(&Kernels::layer_norm, a);
}

Napi::Value layer_norm_backward(Call& call) {
  LayerNormBackwardArgs a;
  a.d_out = call.in("dOut", kFloats);
  a.x = call.in("x", kFloats);
  a.weight = call.in("weight", kFloats);
  a.stats = call.in("stats", kF32);
  const Shape stats = rows_of(call, a.x);
  call.same_dtype("dOut", a.d_out, a.x.dtype);
  call.same_dtype("weight", a.weight, a.x.dtype);
  call.same_shape("dOut", a.d_out, a.x.shape);
  call.same_shape("weight", a.weight, {a.x.shape[-1]});
  call.same_shape("stats", a.stats, stats);
  a.d_x = call.result(a.x.dtype, a.x.shape);
  a.d_weight = call.result(DType::f32, a.weight.shape);
  a.d_bias = call.result(DType::f32, a.weight.shape);
  return call.run(&Kernels::layer_norm_backward, a);
}

}  // namespace p2r::binding

#include "ops/rms_norm.h"

#include "binding/op.h"

namespace p2r::binding {

namespace {

// x's shape without its last axis.
Shape rows_of(const Call& call, const View& x) {
  call.check(x.shape.rank >= 1, Code::shape, "x must have at least 1 axis, got []");
  Shape rows = x.shape;
  --rows.rank;
  return rows;
}

}  // namespace

Napi::Value rms_norm(Call& call) {
  RmsNormArgs a;
  a.x = call.in("x", kFloats);
  a.weight = call.in("weight", kFloats);
  a.eps = call.number("eps", 0, 1e30);
  a.residual = call.maybe_in("residual", kFloats);
  const Shape rows = rows_of(call, a.x);
  call.same_dtype("weight", a.weight, a.x.dtype);
  call.same_shape("weight", a.weight, {a.x.shape[-1]});
  if (a.residual) {
    call.same_dtype("residual", a.residual, a.x.dtype);
    call.same_shape("residual", a.residual, a.x.shape);
  }
  a.out = call.result(a.x.dtype, a.x.shape);
  a.rstd = call.result(DType::f32, rows);
  if (a.residual) a.sum = call.result(a.x.dtype, a.x.shape);
  return call.run(&Kernels::rms_norm, a);
}

Napi::Value rms_norm_backward(Call& call) {
  RmsNormBackwardArgs a;
  a.d_out = call.in("dOut", kFloats);
  a.x = call.in("x", kFloats);
  a.weight = call.in("weight", kFloats);
  a.rstd = call.in("rstd", kF32);
  a.d_sum = call.maybe_in("dSum", kFloats);
  const Shape rows = rows_of(call, a.x);
  call.same_dtype("dOut", a.d_out, a.x.dtype);
  call.same_dtype("weight", a.weight, a.x.dtype);
  call.same_shape("dOut", a.d_out, a.x.shape);
  call.same_shape("weight", a.weight, {a.x.shape[-1]});
  call.same_shape("rstd", a.rstd, rows);
  if (a.d_sum) {
    call.same_dtype("dSum", a.d_sum, a.x.dtype);
    call.same_shape("dSum", a.d_sum, a.x.shape);
  }
  a.d_x = call.result(a.x.dtype, a.x.shape);
  a.d_weight = call.result(DType::f32, a.weight.shape);
  return call.run(&Kernels::rms_norm_backward, a);
}

}  // namespace p2r::binding

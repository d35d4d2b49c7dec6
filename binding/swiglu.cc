#include "ops/swiglu.h"

#include "binding/op.h"

namespace p2r::binding {

namespace {

// The shape of out, of gates that are packed with their ups.
Shape unpacked(const Call& call, const View& packed) {
  Shape shape = packed.shape;
  call.check(shape.rank >= 1 && shape[-1] % 2 == 0, Code::shape,
             "gateUp must have a last axis of even size, got " + to_string(shape));
  shape.dim[shape.rank - 1] /= 2;
  return shape;
}

// Reads gate and up, or gateUp; returns the shape of out.
template <class Args>
Shape read_gates(Call& call, Args& a) {
  if (call.given()) {
    a.gate = call.in("gateUp", kFloats);
    return unpacked(call, a.gate);
  }
  a.gate = call.in("gate", kFloats);
  a.up = call.in("up", kFloats);
  call.same_dtype("up", a.up, a.gate.dtype);
  call.same_shape("up", a.up, a.gate.shape);
  return a.gate.shape;
}

}  // namespace

Napi::Value swiglu(Call& call) {
  SwigluArgs a;
  const Shape shape = read_gates(call, a);
  a.out = call.result(a.gate.dtype, shape);
  return call.run(&Kernels::swiglu, a);
}

Napi::Value swiglu_backward(Call& call) {
  SwigluBackwardArgs a;
  a.d_out = call.in("dOut", kFloats);
  const Shape shape = read_gates(call, a);
  call.same_dtype("dOut", a.d_out, a.gate.dtype);
  call.same_shape("dOut", a.d_out, shape);
  a.d_gate = call.result(a.gate.dtype, a.gate.shape);
  if (a.up) a.d_up = call.result(a.gate.dtype, a.gate.shape);
  return call.run(&Kernels::swiglu_backward, a);
}

}  // namespace p2r::binding

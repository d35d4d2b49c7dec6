#include "ops/elementwise.h"

#include "binding/op.h"

namespace p2r::binding {

namespace {

template <class Args>
Napi::Value combine(Call& call, void (*Kernels::*function)(const Args&, Device&)) {
  Args a;
  a.x = call.in("x", kFloats);
  a.y = call.in("y", kFloats);
  call.same_dtype("y", a.y, a.x.dtype);
  Shape shape;
  call.check(broadcast(a.x.shape, a.y.shape, &shape), Code::shape,
             "y must broadcast with x, whose shape is " + to_string(a.x.shape) + ", got " +
                 to_string(a.y.shape));
  a.out = call.result(a.x.dtype, shape);
  return call.run(function, a);
}

}  // namespace

Napi::Value add(Call& call) { return combine(call, &Kernels::add); }
Napi::Value mul(Call& call) { return combine(call, &Kernels::mul); }

}  // namespace p2r::binding

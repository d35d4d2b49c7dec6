#include "ops/gelu.h"

#include "binding/op.h"

namespace p2r::binding {

Napi::Value gelu(Call& call) {
  GeluArgs a;
  a.x = call.in("x", kFloats);
  a.tanh = call.flag("approximate");
  a.out = call.result(a.x.dtype, a.x.shape);
  return call.run(&Kernels::gelu, a);
}

Napi::Value gelu_backward(Call& call) {
  GeluBackwardArgs a;
  a.d_out = call.in("dOut", kFloats);
  a.x = call.in("x", kFloats);
  a.tanh = call.flag("approximate");
  call.same_dtype("dOut", a.d_out, a.x.dtype);
  call.same_shape("dOut", a.d_out, a.x.shape);
  a.d_x = call.result(a.x.dtype, a.x.shape);
  return call.run(&Kernels::gelu_backward, a);
}

}  // namespace p2r::binding

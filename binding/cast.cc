#include "ops/cast.h"

#include "binding/op.h"

namespace p2r::binding {

Napi::Value cast(Call& call) {
  CastArgs a;
  a.x = call.in("x", kAny);
  const DType dtype = parse_dtype(call.text("dtype"));
  a.out = call.result(dtype, a.x.shape);
  return call.run(&Kernels::cast, a);
}

}  // namespace p2r::binding

#include "ops/sampling.h"

#include "binding/op.h"

namespace p2r::binding {

Napi::Value sample(Call& call) {
  SampleArgs a;
  a.logits = call.in("logits", kFloats, 2);
  a.temperature = call.number("temperature", 0, 1e30);
  a.seed = call.integer("seed", 0, (int64_t{1} << 53) - 1);
  const int64_t rows = a.logits.shape[0], vocabulary = a.logits.shape[1];
  call.check(rows == 0 || vocabulary > 0, Code::shape,
             "logits must have a vocabulary of at least 1, got " + to_string(a.logits.shape));
  call.check(rows <= INT32_MAX && vocabulary <= INT32_MAX, Code::shape,
             "logits must have fewer than 2^31 rows and columns, got " + to_string(a.logits.shape));
  a.out = call.result(DType::i32, {rows});
  return call.run(&Kernels::sample, a);
}

}  // namespace p2r::binding

#include "ops/optimizer.h"

#include <limits>

#include "binding/op.h"

namespace p2r::binding {

namespace {

std::string entry(const char* name, size_t i) {
  return std::string(name) + "[" + std::to_string(i) + "]";
}

}  // namespace

Napi::Value clip_grad_norm(Call& call) {
  ClipGradNormArgs a;
  a.grads = call.inout_list("grads", kFloats);
  a.max_norm = call.number("maxNorm", 0, std::numeric_limits<double>::max());
  a.norm = call.result(DType::f32, {1});
  return call.run(&Kernels::clip_grad_norm, a);
}

Napi::Value adam_w(Call& call) {
  AdamWArgs a;
  a.params = call.inout_list("params", kFloats);
  a.grads = call.in_list("grads", kFloats);
  a.moments = call.inout_list("moments", kF32);
  constexpr double kMaxFinite = std::numeric_limits<double>::max();
  a.step = call.integer("step", 1, int64_t{1} << 53);
  a.lr = call.number("lr", 0, kMaxFinite);
  a.beta1 = call.number("betas[0]", 0, 1);
  a.beta2 = call.number("betas[1]", 0, 1);
  a.eps = call.number("eps", 0, kMaxFinite);
  a.weight_decay = call.number("weightDecay", 0, kMaxFinite);
  call.check(a.beta1 < 1 && a.beta2 < 1, Code::value, "betas must be less than 1");
  const size_t n = a.params.size();
  call.check(a.grads.size() == n && a.moments.size() == n, Code::shape,
             "grads and moments must have an entry for each of the " + std::to_string(n) +
                 " params, got " + std::to_string(a.grads.size()) + " and " +
                 std::to_string(a.moments.size()));
  for (size_t i = 0; i < n; ++i) {
    const View &p = a.params[i], &g = a.grads[i];
    const Shape moments = {2, p.size()};
    if (g.dtype != DType::f32 && g.dtype != p.dtype)
      call.same_dtype(entry("grads", i).c_str(), g, p.dtype);
    if (!(g.shape == p.shape)) call.same_shape(entry("grads", i).c_str(), g, p.shape);
    if (!(a.moments[i].shape == moments))
      call.same_shape(entry("moments", i).c_str(), a.moments[i], moments);
  }
  return call.run(&Kernels::adam_w, a);
}

}  // namespace p2r::binding

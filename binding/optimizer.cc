#include "ops/optimizer.h"

#include <algorithm>
#include <limits>

#include "binding/op.h"

namespace p2r::binding {

namespace {

std::string entry(const char* name, size_t i) {
  return std::string(name) + "[" + std::to_string(i) + "]";
}

struct Range {
  const char *begin, *end;
};
void append(std::vector<Range>& ranges, const std::vector<InOut>& tensors) {
  for (const View& v : tensors)
    if (v.size()) ranges.push_back({v.as<const char>(), v.as<const char>() + v.bytes()});
}

// Several threads write at once, so the tensors they write must be disjoint.
void check_disjoint(const Call& call, std::vector<Range> ranges, const char* names) {
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < ranges.size(); ++i)
    call.check(ranges[i].begin >= ranges[i - 1].end, Code::value,
               std::string(names) + " must not share memory with each other");
}

}  // namespace

Napi::Value clip_grad_norm(Call& call) {
  ClipGradNormArgs a;
  a.grads = call.inout_list("grads", kFloats);
  a.max_norm = call.number("maxNorm", 0, std::numeric_limits<double>::max());
  std::vector<Range> ranges;
  append(ranges, a.grads);
  check_disjoint(call, std::move(ranges), "grads");
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
  std::vector<Range> ranges;
  append(ranges, a.params);
  append(ranges, a.moments);
  check_disjoint(call, std::move(ranges), "params and moments");
  return call.run(&Kernels::adam_w, a);
}

}  // namespace p2r::binding

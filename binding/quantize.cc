#include "ops/quantize.h"

#include "binding/log_probs.h"

namespace p2r::binding {

namespace {

int read_bits(Call& call) {
  const int64_t bits = call.integer("bits", 4, 8);
  call.check(bits == 4 || bits == 8, Code::value,
             "bits must be 8 or 4, got " + std::to_string(bits));
  return static_cast<int>(bits);
}

int64_t read_group(Call& call) {
  const int64_t group = call.integer("group", 32, 64);
  call.check(group == 32 || group == 64, Code::value,
             "group must be 32 or 64, got " + std::to_string(group));
  return group;
}

void check_layout(const Call& call, const View& values, const View& scales,
                  const QuantizedLayout& layout) {
  call.same_shape("weight", values, layout.values());
  call.same_shape("the weight's scales", scales, layout.scales());
}

// Reads a weight of x's columns, a bias or none, and the weight's layout, in this order; returns
// its rows.
template <class Args>
int64_t read_layer(Call& call, Args& a, const std::string& name, const View& x) {
  a.values = call.in("weight", {DType::u8}, 4);
  a.scales = call.in("the weight's scales", {DType::f16}, 3);
  a.bias = call.maybe_in("bias", kFloats, 1);
  a.bits = read_bits(call);
  a.group = read_group(call);
  const int64_t features = call.integer("features", 0, kMaxElements);
  const int64_t channels = call.integer("channels", 0, kMaxElements);
  call.check(channels == x.shape[-1], Code::shape,
             "weight must have as many columns as " + name + "'s last axis, " +
                 std::to_string(x.shape[-1]) + ", got [" + std::to_string(features) + ", " +
                 std::to_string(channels) + "]");
  check_layout(call, a.values, a.scales, {features, channels, a.bits, a.group});
  if (a.bias) {
    call.check(a.bias.dtype == x.dtype || a.bias.dtype == DType::f32, Code::dtype,
               "bias must be f32 or as " + name + ", " + std::string(p2r::to_string(x.dtype)) +
                   ", got " + p2r::to_string(a.bias.dtype));
    call.same_shape("bias", a.bias, {features});
  }
  return features;
}

}  // namespace

Napi::Value quantize(Call& call) {
  QuantizeArgs a;
  a.weight = call.in("weight", kFloats, 2);
  a.bits = read_bits(call);
  a.group = read_group(call);
  a.values = call.result(DType::u8, a.layout().values());
  a.scales = call.result(DType::f16, a.layout().scales());
  return call.run(&Kernels::quantize, a);
}

Napi::Value dequantize(Call& call) {
  DequantizeArgs a;
  a.values = call.in("weight", {DType::u8}, 4);
  a.scales = call.in("the weight's scales", {DType::f16}, 3);
  a.bits = read_bits(call);
  a.group = read_group(call);
  const int64_t features = call.integer("features", 0, kMaxElements);
  const int64_t channels = call.integer("channels", 0, kMaxElements);
  check_layout(call, a.values, a.scales, {features, channels, a.bits, a.group});
  a.out = call.result(DType::f32, {features, channels});
  return call.run(&Kernels::dequantize, a);
}

Napi::Value quantized_linear(Call& call) {
  QuantizedLinearArgs a;
  call.name("linear");
  a.x = call.in("x", kFloats);
  call.check(a.x.shape.rank >= 1, Code::shape, "x must have at least 1 axis, got []");
  const int64_t features = read_layer(call, a, "x", a.x);
  const bool unrounded = call.flag("dtype");
  Shape shape = a.x.shape;
  shape.dim[shape.rank - 1] = features;
  a.out = call.result(unrounded ? DType::f32 : a.x.dtype, shape);
  return call.run(&Kernels::quantized_linear, a);
}

Napi::Value quantized_linear_log_probs(Call& call) {
  QuantizedLinearLogProbsArgs a;
  call.name("linearLogProbs");
  a.hidden = call.in("hidden", kFloats, 2);
  a.vocabulary = read_layer(call, a, "hidden", a.hidden);
  a.targets = read_targets(call, a.hidden);
  a.temperature = call.number("temperature", kMinTemperature, kMaxTemperature);
  log_prob_results(call, a, a.hidden.shape[0]);
  return call.run(&Kernels::quantized_linear_log_probs, a);
}

}  // namespace p2r::binding

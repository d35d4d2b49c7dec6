#include "ops/attention.h"

#include <cmath>

#include "binding/op.h"
#include "ops/kernel_choice.h"

namespace p2r::binding {

namespace {

// Reads q, k and (except for the mass) v, or qkv with or without rotary tables. Returns [T, H, D].
template <class Args>
Shape inputs(Call& call, Args& a) {
  a.q = call.maybe_in("q", kFloats, 3);
  a.k = call.maybe_in("k", kFloats, 3);
  if constexpr (requires { a.v; }) a.v = call.maybe_in("v", kFloats, 3);
  a.qkv = call.maybe_in("qkv", kFloats, 4);
  a.cos = call.maybe_in("rotary.cos", kF32, 2);
  a.sin = call.maybe_in("rotary.sin", kF32, 2);
  call.check(a.q || a.qkv, Code::value, "q or qkv is missing");

  Shape shape;
  if (a.qkv) {
    call.check(a.qkv.shape[1] == 3, Code::shape,
               "qkv must have shape [T, 3, H, D], got " + to_string(a.qkv.shape));
    shape = {a.qkv.shape[0], a.qkv.shape[2], a.qkv.shape[3]};
  } else {
    shape = a.q.shape;
    const auto like_q = [&](const char* name, const In& x) {
      call.check(static_cast<bool>(x), Code::value, std::string(name) + " is missing");
      call.same_shape(name, x, shape);
      call.same_dtype(name, x, a.q.dtype);
    };
    like_q("k", a.k);
    if constexpr (requires { a.v; }) like_q("v", a.v);
  }
  const int64_t d = shape[2];
  call.check(d >= 8 && d <= 128 && d % 8 == 0, Code::shape,
             "the head dimension must be a multiple of 8 from 8 to 128, got " + std::to_string(d));
  call.check(shape[0] <= INT32_MAX, Code::shape,
             "the number of tokens must be at most 2147483647, got " + std::to_string(shape[0]));
  call.check(static_cast<bool>(a.cos) == static_cast<bool>(a.sin), Code::value,
             "rotary needs both cos and sin");
  call.check(!a.cos || a.qkv, Code::value, "rotary needs a packed qkv");
  if (a.cos) {
    call.same_shape("rotary.cos", a.cos, {shape[0], d});
    call.same_shape("rotary.sin", a.sin, {shape[0], d});
  }
  return shape;
}

double scale_of(Call& call, const Shape& shape) {
  if (!call.given()) return 1 / std::sqrt(static_cast<double>(shape[2]));
  return call.number("scale", -HUGE_VAL, HUGE_VAL);
}

// The index of the kernel given by name, or of the first that supports and suits the input.
int64_t kernel_of(Call& call, DType dtype, const Shape& shape, const Ints& cu_seqlens) {
  const bool given = call.given();
  const std::string name = given ? call.text("kernel") : "";
  const std::vector<KernelChoice> choices = kernel_choices("attention", call.device().info());
  std::vector<const char*> names;
  for (size_t i = 0; i < choices.size(); ++i) {
    if (!choices[i].supports(dtype, shape[-1])) continue;
    if (given ? name == choices[i].name : choices[i].suits(cu_seqlens))
      return static_cast<int64_t>(i);
    names.push_back(choices[i].name);
  }
  throw Error(Code::value, "kernel must be " + quoted_list(names) + " for " + to_string(dtype) +
                               " with head dimension " + std::to_string(shape[-1]) + ", got '" +
                               name + "'");
}

}  // namespace

Napi::Value attention(Call& call) {
  AttentionArgs a;
  const Shape shape = inputs(call, a);
  const DType dtype = a.qkv ? a.qkv.dtype : a.q.dtype;
  a.cu_seqlens = call.cu_seqlens("cuSeqlens", shape[0]);
  a.scale = scale_of(call, shape);
  a.kernel = kernel_of(call, dtype, shape, a.cu_seqlens);
  a.out = call.result(dtype, shape);
  a.lse = call.result(DType::f32, {shape[1], shape[0]});
  return call.run(&Kernels::attention, a);
}

Napi::Value attention_backward(Call& call) {
  AttentionBackwardArgs a;
  const Shape shape = inputs(call, a);
  const DType dtype = a.qkv ? a.qkv.dtype : a.q.dtype;
  a.d_out = call.in("dOut", kFloats, 3);
  call.same_shape("dOut", a.d_out, shape);
  call.same_dtype("dOut", a.d_out, dtype);
  a.out = call.in("out", kFloats, 3);
  call.same_shape("out", a.out, shape);
  call.same_dtype("out", a.out, dtype);
  a.lse = call.in("lse", kF32, 2);
  call.same_shape("lse", a.lse, {shape[1], shape[0]});
  a.cu_seqlens = call.cu_seqlens("cuSeqlens", shape[0]);
  a.scale = scale_of(call, shape);
  a.deterministic = call.flag("deterministic");
  a.kernel = kernel_of(call, dtype, shape, a.cu_seqlens);
  if (a.qkv) {
    a.d_qkv = call.result(dtype, a.qkv.shape);
  } else {
    a.d_q = call.result(dtype, shape);
    a.d_k = call.result(dtype, shape);
    a.d_v = call.result(dtype, shape);
  }
  return call.run(&Kernels::attention_backward, a);
}

Napi::Value attention_mass(Call& call) {
  AttentionMassArgs a;
  const Shape shape = inputs(call, a);
  a.lse = call.in("lse", kF32, 2);
  call.same_shape("lse", a.lse, {shape[1], shape[0]});
  a.cu_seqlens = call.cu_seqlens("cuSeqlens", shape[0]);
  a.scale = scale_of(call, shape);
  a.mass = call.result(DType::f32, {shape[1], shape[0]});
  return call.run(&Kernels::attention_mass, a);
}

}  // namespace p2r::binding

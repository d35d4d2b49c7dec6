#include "ops/attention.h"

#include <cmath>

#include "binding/op.h"
#include "ops/kernel_choice.h"

namespace p2r::binding {

namespace {

// Whether an operation takes AttentionKeys.
template <class Args>
constexpr bool kTakesKeys = requires(Args a) {
  a.keys;
};

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
    const auto like = [&](const char* name, const In& x, const Shape& expected) {
      call.same_shape(name, x, expected);
      call.same_dtype(name, x, a.q.dtype);
    };
    const auto present = [&](const char* name, const In& x) {
      call.check(static_cast<bool>(x), Code::value, std::string(name) + " is missing");
    };
    present("k", a.k);
    if constexpr (requires { a.v; }) present("v", a.v);
    if constexpr (kTakesKeys<Args>) {
      const int64_t heads = shape[1], key_heads = a.k.shape[1];
      like("k", a.k, {a.k.shape[0], key_heads, shape[2]});
      like("v", a.v, a.k.shape);
      call.check(key_heads ? heads % key_heads == 0 : heads == 0, Code::shape,
                 "the heads of k must divide those of q, " + std::to_string(heads) + ", got " +
                     std::to_string(key_heads));
      call.check(
          a.k.shape[0] <= INT32_MAX, Code::shape,
          "the number of keys must be at most 2147483647, got " + std::to_string(a.k.shape[0]));
    } else {
      like("k", a.k, shape);
    }
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

// Reads cuSeqlens, causal, cuSeqlensK and sharedKeys, the last as starts and lengths in turn.
template <class Args>
void keys_of(Call& call, Args& a, int64_t tokens) {
  a.cu_seqlens = call.cu_seqlens("cuSeqlens", tokens);
  const size_t sequences = a.cu_seqlens.size() - 1;
  AttentionKeys& keys = a.keys;
  keys.causal = call.flag("causal");
  const bool has_k = call.given();
  if (has_k) keys.cu_seqlens_k = call.ints("cuSeqlensK", 0, INT32_MAX);
  const bool shares = call.given();
  if (shares) keys.shared_keys = call.ints("sharedKeys", 0, INT32_MAX);
  call.check(!(has_k || shares) || !a.qkv, Code::value,
             "cuSeqlensK and sharedKeys need q, k and v, not qkv");
  const int64_t rows = a.qkv ? tokens : a.k.shape[0];
  const auto must = [&](const std::string& what, int64_t expected, int64_t got) {
    call.check(expected == got, Code::value,
               what + ", " + std::to_string(expected) + ", got " + std::to_string(got));
  };
  const Ints& own = has_k ? keys.cu_seqlens_k : a.cu_seqlens;
  if (has_k) {
    must("cuSeqlensK must be as long as cuSeqlens", static_cast<int64_t>(sequences + 1),
         static_cast<int64_t>(own.size()));
    for (size_t s = 0; s < sequences; ++s)
      if (own[s + 1] < own[s])
        throw Error(Code::value, "cuSeqlensK must not decrease, but [" + std::to_string(s + 1) +
                                     "] is " + std::to_string(own[s + 1]) + " after " +
                                     std::to_string(own[s]));
    call.check(shares || own.front() == 0, Code::value, "cuSeqlensK must start with 0");
  }
  if (shares) {
    call.check(own.back() <= rows, Code::value,
               std::string(has_k ? "cuSeqlensK" : "cuSeqlens") +
                   " must end within the rows of k, " + std::to_string(rows) + ", got " +
                   std::to_string(own.back()));
    must("sharedKeys must have a range for each sequence", static_cast<int64_t>(sequences),
         static_cast<int64_t>(keys.shared_keys.size() / 2));
  } else if (has_k) {
    must("cuSeqlensK must end with the number of keys", rows, own.back());
  } else {
    call.check(rows == tokens, Code::shape,
               "k must have as many rows as q, " + std::to_string(tokens) +
                   ", unless there are cuSeqlensK or sharedKeys, got " + std::to_string(rows));
  }
  for (size_t s = 0; shares && s < sequences; ++s) {
    const AttentionSequence x = keys.sequence(a.cu_seqlens, s);
    const auto range = [&] {
      return "sharedKeys[" + std::to_string(s) + "], rows " + std::to_string(x.shared) + " to " +
             std::to_string(x.shared + x.shared_keys) + ",";
    };
    if (x.shared + x.shared_keys > rows)
      throw Error(Code::value, range() + " must be within the rows of k, " + std::to_string(rows));
    if (x.shared_keys && x.shared < own.back() && own.front() < x.shared + x.shared_keys)
      throw Error(Code::value, range() + " must be outside of the sequences' own keys, rows " +
                                   std::to_string(own.front()) + " to " +
                                   std::to_string(own.back()));
    if (x.keys() > INT32_MAX)
      throw Error(Code::value, "a sequence must have at most 2147483647 keys");
  }
}

double scale_of(Call& call, const Shape& shape) {
  if (!call.given()) return 1 / std::sqrt(static_cast<double>(shape[2]));
  return call.number("scale", -HUGE_VAL, HUGE_VAL);
}

// The index of the kernel given by name, or of the first that supports and suits the input.
template <class Args>
int64_t kernel_of(Call& call, const Args& a) {
  const AttentionLayout in = attention_layout(a.q, a.k, a.v, a.qkv);
  const bool own_sequence = sees_own_sequence(in, a.keys);
  const bool given = call.given();
  const std::string name = given ? call.text("kernel") : "";
  const std::vector<KernelChoice> choices = kernel_choices("attention", call.device().info());
  std::vector<const char*> names;
  for (size_t i = 0; i < choices.size(); ++i) {
    if (!choices[i].supports(in.dtype, in.head_dim)) continue;
    if (!own_sequence && !choices[i].any_keys) continue;
    if (given ? name == choices[i].name : choices[i].suits(a.cu_seqlens))
      return static_cast<int64_t>(i);
    names.push_back(choices[i].name);
  }
  throw Error(Code::value, "kernel must be " + quoted_list(names) + " for " + to_string(in.dtype) +
                               " with head dimension " + std::to_string(in.head_dim) +
                               (own_sequence ? "" : " and these keys") + ", got '" + name + "'");
}

}  // namespace

Napi::Value attention(Call& call) {
  AttentionArgs a;
  const Shape shape = inputs(call, a);
  const DType dtype = a.qkv ? a.qkv.dtype : a.q.dtype;
  keys_of(call, a, shape[0]);
  a.scale = scale_of(call, shape);
  a.kernel = kernel_of(call, a);
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
  keys_of(call, a, shape[0]);
  a.scale = scale_of(call, shape);
  a.deterministic = call.flag("deterministic");
  a.kernel = kernel_of(call, a);
  if (a.qkv) {
    a.d_qkv = call.result(dtype, a.qkv.shape);
  } else {
    a.d_q = call.result(dtype, shape);
    a.d_k = call.result(dtype, a.k.shape);
    a.d_v = call.result(dtype, a.k.shape);
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

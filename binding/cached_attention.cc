#include "ops/cached_attention.h"

#include <cmath>

#include "binding/op.h"

namespace p2r::binding {

// `lengths` and `tables` are KvCache's own (lib/ops/cached_attention.ts); they are checked for the
// memory's sake.
Napi::Value cached_attention(Call& call) {
  CachedAttentionArgs a;
  a.q = call.in("q", kFloats, 3);
  a.k = call.in("k", kFloats, 3);
  a.v = call.in("v", kFloats, 3);
  a.pages = call.inout("cache", kFloats, 6);
  const Shape shape = a.q.shape, cache = a.pages.shape;
  const int64_t tokens = shape[0], heads = shape[1], d = cache[5], key_heads = cache[3];
  call.same_shape("q", a.q, {tokens, heads, d});
  call.same_shape("k", a.k, {tokens, key_heads, d});
  call.same_shape("v", a.v, a.k.shape);
  for (const auto& [name, x] : {std::pair{"q", a.q}, {"k", a.k}, {"v", a.v}})
    call.same_dtype(name, x, a.pages.dtype);
  call.check(heads % key_heads == 0, Code::shape,
             "the cache's heads must divide those of q, " + std::to_string(heads) + ", got " +
                 std::to_string(key_heads));
  a.cu_seqlens = call.cu_seqlens("cuSeqlens", tokens);
  a.lengths = call.ints("lengths", 0, INT32_MAX);
  a.tables = call.ints("tables", 0, cache[0] - 1);
  a.layer = call.integer("layer", 0, cache[1] - 1);
  a.scale = call.given() ? call.number("scale", -HUGE_VAL, HUGE_VAL)
                         : 1 / std::sqrt(static_cast<double>(d));
  call.check(a.lengths.size() + 1 == a.cu_seqlens.size(), Code::value,
             "sequences must be as many as those of cuSeqlens, " +
                 std::to_string(a.cu_seqlens.size() - 1) + ", got " +
                 std::to_string(a.lengths.size()));
  int64_t listed = 0;
  for (size_t s = 0; s < a.lengths.size(); ++s) {
    call.check(a.total(s) <= INT32_MAX, Code::value,
               "a sequence must have at most 2147483647 keys");
    listed += a.pages_of(s);
  }
  call.check(listed == static_cast<int64_t>(a.tables.size()), Code::value,
             "tables must list the pages of each sequence");
  a.out = call.result(a.q.dtype, shape);
  a.lse = call.result(DType::f32, {heads, tokens});
  return call.run(&Kernels::cached_attention, a);
}

}  // namespace p2r::binding

// Rows of q, k, v and out as operands of products: views of one head, rotary embedding, conversion
// to panel words, stores of transposed results, and prefetch.
#include "cpu/attention/attention.h"

namespace p2r::cpu::attention_kernels {

Rows rows_of(const Call& c, const char* x, int64_t row, int64_t head, Span tokens) {
  return {c.in.dtype, x + (tokens.begin * row + head * c.in.head_dim) * c.size(), row};
}

Rows rotated_rows(const Call& c, const char* x, int64_t head, Span tokens, float* buffer) {
  const Rows rows = rows_of(c, x, c.in.row, head, tokens);
  if (!c.cos) return rows;
  const int64_t d = c.in.head_dim;
  char* out = reinterpret_cast<char*>(buffer);
  for (int64_t t = 0; t < tokens.size(); ++t)
    rotate_row(c, tokens.begin + t,
               static_cast<const char*>(rows.data) + t * rows.stride * c.size(),
               out + t * d * c.size());
  return {c.in.dtype, buffer, d};
}

void rotate_row(const Call& c, int64_t token, const char* from, char* to) {
  const int64_t d = c.in.head_dim, angles = token * d;
  float row[kMaxDim];
  c.simd->to_f32(c.in.dtype, from, row, d);
  c.simd->rotate_half(row, c.cos + angles, c.sin + angles, d / 2, false, row);
  c.simd->from_f32(c.in.dtype, row, to, d);
}

Rows to_words(const Call& c, const Rows& x, int64_t n, int64_t stride, float* buffer) {
  to_panel_words(*c.simd, c.pairs, x.dtype, x.data, x.stride, n, c.in.head_dim, buffer, stride);
  return {c.pairs ? DType::bf16 : DType::f32, buffer, c.pairs ? 2 * stride : stride};
}

void value_words(const Call& c, const Rows& v, int64_t keys, int64_t stride, float* buffer) {
  if (c.pairs)
    c.simd->pair_rows(keys, c.in.head_dim, static_cast<const uint16_t*>(v.data), v.stride, buffer,
                      stride);
  else
    to_words(c, v, keys, stride, buffer);
}

void store_transposed(const Call& c, const float* x, int64_t tokens, float* buffer, char* out,
                      int64_t row, const float* cos, const float* sin) {
  const int64_t d = c.in.head_dim;
  c.simd->transpose(d, tokens, x, c.nr, buffer, d);
  for (int64_t t = 0; t < tokens; ++t) {
    float* values = buffer + t * d;
    if (cos) c.simd->rotate_half(values, cos + t * d, sin + t * d, d / 2, true, values);
    c.simd->from_f32(c.in.dtype, values, out + t * row * c.size(), d);
  }
}

Prefetch prefetch_rows(const Call& c, const char* x, const char* y, int64_t row, int64_t head,
                       Span tokens) {
  Prefetch p;
  const int64_t bytes = c.in.head_dim * c.size();
  p.line = x + (tokens.begin * row + head * c.in.head_dim) * c.size();
  p.second = y ? y - x : 0;
  p.lines_left = p.lines = ceil_div(bytes, 64);
  p.rows = tokens.size();
  p.skip = row * c.size() - 64 * p.lines;
  return p;
}

}  // namespace p2r::cpu::attention_kernels

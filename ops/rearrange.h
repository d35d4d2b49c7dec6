// Copies of tensors in another arrangement, bit for bit.
//
//   concat      out = the parts one after another along an axis
//   split       the parts that such a tensor was made of
//   transpose   out[.., j, .., i, ..] = x[.., i, .., j, ..], two axes exchanged
//
// Any type; the parts of concat have one type, and one shape but for the size of the axis. Each is
// the gradient of the other: split of concat, concat of split, transpose of itself.
#pragma once
#include <tuple>
#include <utility>
#include <vector>

#include "ops/tensor.h"

namespace p2r {

struct ConcatArgs {
  std::vector<In> parts;
  int64_t axis = 0;
  Out out;
  auto fields() { return std::tie(parts, axis, out); }
};

struct SplitArgs {
  In x;
  int64_t axis = 0;
  std::vector<Out> parts;
  auto fields() { return std::tie(x, axis, parts); }
};

// a < b.
struct TransposeArgs {
  In x;
  int64_t a = 0, b = 0;
  Out out;
  auto fields() { return std::tie(x, a, b, out); }
};

// The product of the axes from `from` to `to` - 1.
inline int64_t size_of_axes(const Shape& s, int64_t from, int64_t to) {
  int64_t n = 1;
  for (int64_t i = from; i < to; ++i) n *= s.dim[i];
  return n;
}

// A part's place in the whole, in bytes: `rows` rows, which are neighbours in the part and `pitch`
// apart in the whole, from `first` on.
struct PartRows {
  int64_t rows, bytes, pitch, first;
};

// Of each part along an axis of the whole.
template <class Parts>
std::vector<PartRows> part_rows(const View& whole, const Parts& parts, int64_t axis) {
  const int64_t rows = size_of_axes(whole.shape, 0, axis);
  const auto bytes = [&](const View& v) {
    return size_of_axes(v.shape, axis, v.shape.rank) * static_cast<int64_t>(size_of(v.dtype));
  };
  std::vector<PartRows> out;
  int64_t first = 0;
  for (const View& part : parts) {
    out.push_back({rows, bytes(part), bytes(whole), first});
    first += bytes(part);
  }
  return out;
}

// x as [outer, n, middle, m] runs of `bytes` bytes, which becomes [outer, m, middle, n].
struct TransposeAxes {
  int64_t outer, n, middle, m, bytes;

  explicit TransposeAxes(const TransposeArgs& t)
      : outer(size_of_axes(t.x.shape, 0, t.a)),
        n(t.x.shape.dim[t.a]),
        middle(size_of_axes(t.x.shape, t.a + 1, t.b)),
        m(t.a == t.b ? 1 : t.x.shape.dim[t.b]),
        bytes(size_of_axes(t.x.shape, t.b + 1, t.x.shape.rank) *
              static_cast<int64_t>(size_of(t.x.dtype))) {}
  constexpr int64_t matrices() const { return outer * middle; }
  // In runs: where entry (i, j) of a matrix is in x, and in out.
  constexpr int64_t in(int64_t matrix, int64_t i, int64_t j) const {
    return ((matrix / middle * n + i) * middle + matrix % middle) * m + j;
  }
  constexpr int64_t out(int64_t matrix, int64_t i, int64_t j) const {
    return ((matrix / middle * m + j) * middle + matrix % middle) * n + i;
  }
};

}  // namespace p2r

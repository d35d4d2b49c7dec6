// Sums and products of two tensors, element by element.
//
//   add   out = x + y
//   mul   out = x y
//
// x, y, out f32 | f16 | bf16, of one type; computed in f32, rounded once. Shapes broadcast as
// NumPy's do: aligned at their last axes, an axis of size 1, or one that the other shape has in
// addition, is repeated. out may be x or y where it has their shape.
#pragma once
#include <algorithm>
#include <tuple>

#include "ops/tensor.h"

namespace p2r {

struct AddArgs {
  In x, y;
  Out out;
  auto fields() { return std::tie(x, y, out); }
};

struct MulArgs {
  In x, y;
  Out out;
  auto fields() { return std::tie(x, y, out); }
};

// The size of axis i from the last, 0, on.
inline int64_t size_from_last(const Shape& s, int i) {
  return i < s.rank ? s.dim[s.rank - 1 - i] : 1;
}

// Whether two shapes broadcast to one, which is returned.
inline bool broadcast(const Shape& x, const Shape& y, Shape* out) {
  out->rank = std::max(x.rank, y.rank);
  for (int i = 0; i < out->rank; ++i) {
    const int64_t a = size_from_last(x, i), b = size_from_last(y, i);
    if (a != b && a != 1 && b != 1) return false;
    out->dim[out->rank - 1 - i] = a == 1 ? b : a;
  }
  return true;
}

// The axes of a broadcast result, the last first, joined where both operands go on from one to the
// next; and by how many elements each operand goes on with a step along them, 0 where it is
// repeated. The first axis is one along which each operand is contiguous or repeated.
struct BroadcastAxes {
  int rank = 1;
  int64_t size[kMaxRank] = {1}, x[kMaxRank] = {1}, y[kMaxRank] = {1};

  BroadcastAxes(const Shape& xs, const Shape& ys, const Shape& out) {
    int64_t next_x = 1, next_y = 1;
    int axis = -1;
    for (int i = 0; i < out.rank; ++i) {
      const int64_t n = size_from_last(out, i), nx = size_from_last(xs, i),
                    ny = size_from_last(ys, i);
      if (n == 1) continue;
      const int64_t step_x = nx == 1 ? 0 : next_x, step_y = ny == 1 ? 0 : next_y;
      next_x *= nx;
      next_y *= ny;
      if (axis >= 0 && step_x == x[axis] * size[axis] && step_y == y[axis] * size[axis]) {
        size[axis] *= n;
      } else {
        ++axis;
        size[axis] = n;
        x[axis] = step_x;
        y[axis] = step_y;
      }
    }
    if (axis >= 0) rank = axis + 1;
  }
};

}  // namespace p2r

#include "ops/rows.h"

#include <algorithm>

#include "binding/op.h"

namespace p2r::binding {

namespace {

// x's shape with another number of rows.
Shape with_rows(Shape shape, int64_t rows) {
  shape.dim[0] = rows;
  return shape;
}

void at_least_one_axis(const Call& call, const char* name, const View& x) {
  call.check(x.shape.rank >= 1, Code::shape,
             std::string(name) + " must have at least 1 axis, got []");
}

}  // namespace

Napi::Value gather_rows(Call& call) {
  GatherRowsArgs a;
  a.x = call.in("x", kAny);
  at_least_one_axis(call, "x", a.x);
  a.index = call.ints("index", 0, a.x.shape[0] - 1);
  a.out = call.result(a.x.dtype, with_rows(a.x.shape, static_cast<int64_t>(a.index.size())));
  return call.run(&Kernels::gather_rows, a);
}

Napi::Value gather_rows_backward(Call& call) {
  GatherRowsBackwardArgs a;
  a.d_out = call.in("dOut", kFloats);
  at_least_one_axis(call, "dOut", a.d_out);
  const int64_t rows = call.integer("rows", 0, INT32_MAX);
  a.index = call.ints("index", 0, rows - 1);
  call.check(a.d_out.shape[0] == static_cast<int64_t>(a.index.size()), Code::shape,
             "dOut must have a row for each of the " + std::to_string(a.index.size()) +
                 " indices, got " + to_string(a.d_out.shape));
  a.d_x = call.result(a.d_out.dtype, with_rows(a.d_out.shape, rows));
  return call.run(&Kernels::gather_rows_backward, a);
}

namespace {

// Reads x, y, which may be absent, and the rows of x that y's rows go to.
template <class Args>
void read_scatter(Call& call, Args& a, DTypes dtypes, bool optional) {
  a.x = call.in("x", dtypes);
  at_least_one_axis(call, "x", a.x);
  a.y = optional ? call.maybe_in("y", dtypes) : call.in("y", dtypes);
  a.index = call.ints("index", 0, a.x.shape[0] - 1);
  if (!a.y) return;
  call.same_dtype("y", a.y, a.x.dtype);
  call.same_shape("y", a.y, with_rows(a.x.shape, static_cast<int64_t>(a.index.size())));
}

}  // namespace

Napi::Value scatter_rows(Call& call) {
  ScatterRowsArgs a;
  read_scatter(call, a, kAny, true);
  Ints sorted = a.index;
  std::sort(sorted.begin(), sorted.end());
  const auto repeated = std::adjacent_find(sorted.begin(), sorted.end());
  if (repeated != sorted.end())
    throw Error(Code::value, "index must not repeat, but row " + std::to_string(*repeated) +
                                 " is in it more than once");
  a.out = call.result(a.x.dtype, a.x.shape);
  return call.run(&Kernels::scatter_rows, a);
}

Napi::Value scatter_add_rows(Call& call) {
  ScatterAddRowsArgs a;
  read_scatter(call, a, kFloats, false);
  a.out = call.result(a.x.dtype, a.x.shape);
  return call.run(&Kernels::scatter_add_rows, a);
}

Napi::Value mean_pool(Call& call) {
  MeanPoolArgs a;
  a.x = call.in("x", kFloats, 2);
  a.cu_seqlens = call.cu_seqlens("cuSeqlens", a.x.shape[0]);
  a.out =
      call.result(a.x.dtype, with_rows(a.x.shape, static_cast<int64_t>(a.cu_seqlens.size()) - 1));
  return call.run(&Kernels::mean_pool, a);
}

Napi::Value mean_pool_backward(Call& call) {
  MeanPoolBackwardArgs a;
  a.d_out = call.in("dOut", kFloats, 2);
  // No tensor of this call has as many rows as tokens: the last entry is any number.
  a.cu_seqlens = call.cu_seqlens("cuSeqlens");
  call.check(a.d_out.shape[0] == static_cast<int64_t>(a.cu_seqlens.size()) - 1, Code::shape,
             "dOut must have a row for each of the " + std::to_string(a.cu_seqlens.size() - 1) +
                 " sequences, got " + to_string(a.d_out.shape));
  a.d_x = call.result(a.d_out.dtype, with_rows(a.d_out.shape, a.cu_seqlens.back()));
  return call.run(&Kernels::mean_pool_backward, a);
}

}  // namespace p2r::binding

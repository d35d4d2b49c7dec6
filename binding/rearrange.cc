#include "ops/rearrange.h"

#include "binding/op.h"

namespace p2r::binding {

namespace {

// An axis of a tensor, from 0 or from -1 for the last.
int64_t read_axis(Call& call, const char* name, const View& x) {
  const int rank = x.shape.rank;
  call.check(rank > 0, Code::shape, "a scalar has no axes");
  const int64_t axis = call.integer(name, -rank, rank - 1);
  return axis < 0 ? axis + rank : axis;
}

Shape with_axis(Shape shape, int64_t axis, int64_t size) {
  shape.dim[axis] = size;
  return shape;
}

}  // namespace

Napi::Value concat(Call& call) {
  ConcatArgs a;
  a.parts = call.in_list("tensors", kAny);
  call.check(!a.parts.empty(), Code::value, "tensors must not be empty");
  const View& first = a.parts[0];
  a.axis = read_axis(call, "axis", first);
  int64_t size = 0;
  for (size_t k = 0; k < a.parts.size(); ++k) {
    const View& part = a.parts[k];
    const std::string name = "tensors[" + std::to_string(k) + "]";
    call.same_dtype(name.c_str(), part, first.dtype);
    call.check(part.shape.rank == first.shape.rank &&
                   part.shape == with_axis(first.shape, a.axis, part.shape.dim[a.axis]),
               Code::shape,
               name + " must have the shape " + to_string(first.shape) + " but for axis " +
                   std::to_string(a.axis) + ", got " + to_string(part.shape));
    size += part.shape.dim[a.axis];
  }
  a.out = call.result(first.dtype, with_axis(first.shape, a.axis, size));
  return call.run(&Kernels::concat, a);
}

Napi::Value split(Call& call) {
  SplitArgs a;
  a.x = call.in("x", kAny);
  a.axis = read_axis(call, "axis", a.x);
  const Ints sizes = call.ints("sizes", 0, kMaxElements);
  call.check(!sizes.empty(), Code::value, "sizes must not be empty");
  int64_t all = 0;
  for (const int64_t size : sizes) all = all > kMaxElements ? all : all + size;
  call.check(all == a.x.shape.dim[a.axis], Code::value,
             "sizes must add up to the " + std::to_string(a.x.shape.dim[a.axis]) + " of axis " +
                 std::to_string(a.axis) + ", got " + std::to_string(all));
  for (const int64_t size : sizes)
    a.parts.push_back(call.result(a.x.dtype, with_axis(a.x.shape, a.axis, size)));
  return call.run(&Kernels::split, a);
}

Napi::Value transpose(Call& call) {
  TransposeArgs a;
  a.x = call.in("x", kAny);
  const int64_t first = read_axis(call, "axes[0]", a.x), second = read_axis(call, "axes[1]", a.x);
  a.a = std::min(first, second);
  a.b = std::max(first, second);
  Shape shape = a.x.shape;
  std::swap(shape.dim[a.a], shape.dim[a.b]);
  a.out = call.result(a.x.dtype, shape);
  return call.run(&Kernels::transpose, a);
}

}  // namespace p2r::binding

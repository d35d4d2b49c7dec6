#include "ops/reduce.h"

#include <algorithm>

#include "binding/op.h"

namespace p2r::binding {

namespace {

template <class Args>
Napi::Value reduce(Call& call, void (*Kernels::*function)(const Args&, Device&)) {
  Args a;
  a.x = call.in("x", kFloats);
  const int rank = a.x.shape.rank;
  if (call.given()) {
    a.axes = call.ints("axes", -rank, rank - 1);
    for (int64_t& axis : a.axes) axis += axis < 0 ? rank : 0;
    std::sort(a.axes.begin(), a.axes.end());
    call.check(std::adjacent_find(a.axes.begin(), a.axes.end()) == a.axes.end(), Code::value,
               "axes must not repeat");
  } else {
    for (int i = 0; i < rank; ++i) a.axes.push_back(i);
  }
  const bool keep = call.flag("keepDims");
  Shape shape;
  for (int i = 0; i < rank; ++i) {
    const bool summed = std::binary_search(a.axes.begin(), a.axes.end(), int64_t{i});
    if (!summed || keep) shape.dim[shape.rank++] = summed ? 1 : a.x.shape.dim[i];
  }
  a.out = call.result(a.x.dtype, shape);
  return call.run(function, a);
}

}  // namespace

Napi::Value sum(Call& call) { return reduce(call, &Kernels::sum); }
Napi::Value mean(Call& call) { return reduce(call, &Kernels::mean); }

}  // namespace p2r::binding

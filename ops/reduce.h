// Sums and means over axes.
//
//   sum    out = Σ x over the axes
//   mean   the same, divided by the number of elements that are summed; NaN where there are none
//
// x f32 | f16 | bf16; out, of x's type, has the other axes; whether the summed ones stay with size
// 1 is the caller's. Without axes out is x. Sums are taken in f32, rounded once, and in an order
// that depends on the shape alone: neighbouring axes are joined; each group of axes is cut into
// slices of kReduceSlice steps, whose sums are then summed in the same way, so that the error does
// not grow with the number of elements; the last group is summed first.
#pragma once
#include <algorithm>
#include <tuple>
#include <vector>

#include "ops/integer.h"
#include "ops/tensor.h"

namespace p2r {

constexpr int64_t kReduceSlice = 1024;

// axes: rising, without repeats.
struct SumArgs {
  In x;
  Ints axes;
  Out out;
  auto fields() { return std::tie(x, axes, out); }
};

struct MeanArgs {
  In x;
  Ints axes;
  Out out;
  auto fields() { return std::tie(x, axes, out); }
};

// [outer, n, inner] is summed to [outer, slices, inner]; slice s has the steps from s kReduceSlice
// on.
struct ReduceStep {
  int64_t outer, n, inner;

  int64_t slices() const { return n > kReduceSlice ? ceil_div(n, kReduceSlice) : 1; }
  int64_t results() const { return outer * slices() * inner; }
};

inline std::vector<ReduceStep> reduce_steps(const Shape& shape, const Ints& axes) {
  std::vector<ReduceStep> steps;
  int64_t inner = 1;
  for (int i = shape.rank - 1; i >= 0;) {
    const auto is_summed = [&](int axis) {
      return std::binary_search(axes.begin(), axes.end(), int64_t{axis});
    };
    if (!is_summed(i)) {
      inner *= shape.dim[i--];
      continue;
    }
    int64_t n = 1;
    for (; i >= 0 && is_summed(i); --i) n *= shape.dim[i];
    int64_t outer = 1;
    for (int k = 0; k <= i; ++k) outer *= shape.dim[k];
    do {
      steps.push_back({outer, n, inner});
      n = steps.back().slices();
    } while (n > 1);
  }
  if (steps.empty()) steps.push_back({1, 1, shape.size()});
  return steps;
}

// Of the results between the first step's input and the last one's output, in f32: the most
// elements of every second one, from the first and from the second on.
inline std::pair<int64_t, int64_t> between_steps(const std::vector<ReduceStep>& steps) {
  int64_t most[2] = {0, 0};
  for (size_t k = 0; k + 1 < steps.size(); ++k)
    most[k % 2] = std::max(most[k % 2], steps[k].results());
  return {most[0], most[1]};
}

// By how much the sums are multiplied.
inline float mean_factor(const View& x, const View& out) {
  return static_cast<float>(static_cast<double>(out.size()) / static_cast<double>(x.size()));
}

}  // namespace p2r

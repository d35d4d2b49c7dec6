#include "ops/resample_plan.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "ops/half.h"
#include "ops/integer.h"

namespace p2r {

namespace {

double sinc(double x) {
  if (x == 0.0) return 1.0;
  x = x * 3.14159265358979323846;
  return std::sin(x) / x;
}

double filter_at(Filter filter, double x) {
  switch (filter) {
    case Filter::box:
      return x > -0.5 && x <= 0.5 ? 1.0 : 0.0;
    case Filter::bilinear:
      x = std::fabs(x);
      return x < 1.0 ? 1.0 - x : 0.0;
    case Filter::bicubic:
      x = std::fabs(x);
      if (x < 1.0) return ((1.5 * x) - 2.5) * x * x + 1;
      if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * -0.5;
      return 0.0;
    case Filter::lanczos:
      return x >= -3.0 && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0;
  }
  return 0.0;
}

double support_of(Filter filter) {
  constexpr double supports[] = {0.5, 1.0, 2.0, 3.0};
  return supports[static_cast<int>(filter)];
}

// To f32 with the last bit set when inexact: a second rounding, to 16 bits, then gives the same as
// one rounding of the f64.
float round_to_odd(double d) {
  float f = static_cast<float>(d);
  if (static_cast<double>(f) == d || !std::isfinite(f)) return f;
  if (std::fabs(static_cast<double>(f)) > std::fabs(d)) f = std::nextafter(f, 0.0f);
  return f32_of_bits(bits_of_f32(f) | 1);
}

}  // namespace

Axis resample_axis(int64_t in, int64_t out, Filter filter) {
  Axis axis;
  axis.in = in;
  axis.out = out;
  axis.copy = in == out;
  if (axis.copy) return axis;

  const double scale = static_cast<double>(static_cast<float>(in)) / static_cast<double>(out);
  const double filter_scale = std::max(scale, 1.0);
  const double support = support_of(filter) * filter_scale;
  const double inverse = 1.0 / filter_scale;
  auto center_of = [&](int64_t x) { return (static_cast<double>(x) + 0.5) * scale; };
  auto window = [&](int64_t x, int64_t* begin, int64_t* end) {
    const double center = center_of(x);
    *begin = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
    *end = std::min(static_cast<int64_t>(center + support + 0.5), in);
  };

  int64_t begin, end;
  for (int64_t x = 0; x < out; ++x) {
    window(x, &begin, &end);
    axis.taps = std::max(axis.taps, end - begin);
  }
  axis.stride = round_up(axis.taps, 4);
  axis.first.resize(out);
  axis.weights.assign(out * axis.stride, 0);
  std::vector<double> w(axis.taps);
  for (int64_t x = 0; x < out; ++x) {
    window(x, &begin, &end);
    const double center = center_of(x);
    double sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      w[i - begin] = filter_at(filter, (static_cast<double>(i) - center + 0.5) * inverse);
      sum += w[i - begin];
    }
    // A window of `taps` that would reach past the end is shifted; its first weights are 0.
    const int64_t first = std::min(begin, in - axis.taps);
    axis.first[x] = static_cast<int32_t>(first);
    int32_t* weights = &axis.weights[x * axis.stride] + (begin - first);
    for (int64_t i = 0; i < end - begin; ++i) {
      const double k = (sum != 0.0 ? w[i] / sum : w[i]) * (1 << kWeightBits);
      weights[i] = static_cast<int32_t>(k < 0 ? k - 0.5 : k + 0.5);
    }
  }
  return axis;
}

ResamplePlan::ResamplePlan(const std::vector<In>& images, const Ints& fields, Filter filter,
                           const Ints& boxes, const Ints& colors, int64_t line_width) {
  for (const In& image : images)
    strokes.push_back(strokes_of(boxes, colors, line_width, image.shape[0], image.shape[1]));
  auto axis = [&](int64_t in, int64_t out) {
    auto found = axes.find({in, out});
    if (found == axes.end())
      found = axes.emplace(std::pair(in, out), resample_axis(in, out, filter)).first;
    return &found->second;
  };
  for (size_t i = 0; i < fields.size(); i += kRegionFields) {
    const int64_t* f = &fields[i];
    regions.push_back({f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7] != 0, axis(f[3] - f[1], f[6]),
                       axis(f[4] - f[2], f[5])});
  }
}

std::vector<char> pixel_table(const std::vector<double>& mean, const std::vector<double>& std,
                              DType dtype) {
  if (dtype == DType::u8) return {};
  std::vector<char> table(3 * 256 * size_of(dtype));
  for (int c = 0; c < 3; ++c)
    for (int v = 0; v < 256; ++v) {
      const double value = (v / 255.0 - mean[c]) / std[c];
      const size_t at = (c * 256 + v) * size_of(dtype);
      if (dtype == DType::f32) {
        const float f = static_cast<float>(value);
        std::memcpy(&table[at], &f, sizeof f);
      } else {
        const float f = round_to_odd(value);
        const uint16_t h = dtype == DType::f16 ? f16_of_f32(f) : bf16_of_f32(f);
        std::memcpy(&table[at], &h, sizeof h);
      }
    }
  return table;
}

}  // namespace p2r

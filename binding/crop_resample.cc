#include "ops/crop_resample.h"

#include <cmath>

#include "binding/boxes.h"
#include "ops/resample_plan.h"

namespace p2r::binding {

namespace {

constexpr DTypes kFloatsAndU8 = {DType::f32, DType::f16, DType::bf16, DType::u8};

// Beyond these the indices of weights would overflow.
constexpr double kMaxCoordinate = 1 << 30, kMaxSide = 1 << 20, kMaxPixels = 1 << 28,
                 kMaxBoxPixels = 1 << 30;

Ints regions_of(Call& call, size_t images) {
  const std::vector<double> values = call.numbers("regions");
  call.check(values.size() % kRegionFields == 0, Code::value, "regions must have 8 numbers each");
  for (size_t i = 0; i < values.size(); i += kRegionFields) {
    const double* v = &values[i];
    const std::string name = "regions[" + std::to_string(i / kRegionFields) + "]";
    auto integer = [&](const char* field, double x, double low, double high) {
      char got[40];
      snprintf(got, sizeof got, "%.17g", x);
      call.check(x == std::floor(x) && x >= low && x <= high, Code::value,
                 name + "." + field + " must be an integer from " +
                     std::to_string(static_cast<int64_t>(low)) + " to " +
                     std::to_string(static_cast<int64_t>(high)) + ", got " + got);
    };
    integer("image", v[0], 0, static_cast<double>(images) - 1);
    for (int k = 1; k <= 4; ++k) integer("box", v[k], -kMaxCoordinate, kMaxCoordinate);
    call.check(v[3] > v[1] && v[4] > v[2], Code::value,
               name + ".box is empty or inverted; x0 < x1 and y0 < y1 are needed");
    call.check(v[3] - v[1] <= kMaxSide && v[4] - v[2] <= kMaxSide &&
                   (v[3] - v[1]) * (v[4] - v[2]) <= kMaxBoxPixels,
               Code::value, name + ".box is too large");
    integer("height", v[5], 1, kMaxSide);
    integer("width", v[6], 1, kMaxSide);
    call.check(v[5] * v[6] <= kMaxPixels, Code::value,
               name + " must have at most " + std::to_string(static_cast<int64_t>(kMaxPixels)) +
                   " pixels");
    integer("overlay", v[7], 0, 1);
  }
  return {values.begin(), values.end()};
}

template <class Args>
void read_source(Call& call, Args& a) {
  a.images = call.in_list("images", kU8, 3);
  call.check(!a.images.empty(), Code::value, "images must have at least one Tensor");
  for (const In& image : a.images) check_image(call, "image", image);
  a.regions = regions_of(call, a.images.size());
  a.filter = call.choice("filter", kFilters);
  read_boxes(call, &a.boxes, &a.colors, &a.line_width);
}

std::vector<double> three(Call& call, const char* name, bool positive) {
  const std::vector<double> v = call.numbers(name);
  call.check(v.size() == 3, Code::value,
             std::string(name) + " must be 3 numbers, got " + std::to_string(v.size()));
  for (double x : v)
    call.check(std::isfinite(x) && (!positive || x > 0), Code::value,
               std::string(name) + " must be finite" + (positive ? " and greater than 0" : ""));
  return v;
}

DType one_of(Call& call, DTypes types, const char* names) {
  const std::string name = call.text("dtype");
  for (DType t : types)
    if (name == p2r::to_string(t)) return t;
  throw Error(Code::dtype, std::string("dtype must be ") + names + ", got '" + name + "'");
}

}  // namespace

Napi::Value crop_resample(Call& call) {
  CropResampleArgs a;
  read_source(call, a);
  for (size_t i = 0; i < a.regions.size(); i += kRegionFields)
    a.out.push_back(call.result(DType::u8, {a.regions[i + 5], a.regions[i + 6], 3}));
  return call.run(&Kernels::crop_resample, a);
}

Napi::Value pixel_values(Call& call) {
  PixelValuesArgs a;
  read_source(call, a);
  a.patch = call.integer("patchSize", 1, 1024);
  a.temporal = call.integer("temporalPatchSize", 1, 2);
  a.merge = call.integer("mergeSize", 1, 64);
  a.mean = three(call, "mean", false);
  a.std = three(call, "std", true);
  const DType dtype = one_of(call, kFloatsAndU8, "f32, f16, bf16 or u8");
  const int64_t unit = a.patch * a.merge;
  int64_t patches = 0;
  for (size_t i = 0; i < a.regions.size(); i += kRegionFields) {
    const int64_t height = a.regions[i + 5], width = a.regions[i + 6];
    call.check(height % unit == 0 && width % unit == 0, Code::value,
               "regions[" + std::to_string(i / kRegionFields) +
                   "] must have sides that are multiples of patchSize * mergeSize = " +
                   std::to_string(unit) + ", got " + std::to_string(height) + " x " +
                   std::to_string(width));
    patches += (height / a.patch) * (width / a.patch);
  }
  a.out = call.result(dtype, {patches, 3 * a.temporal * a.patch * a.patch});
  return call.run(&Kernels::pixel_values, a);
}

Napi::Value normalize_patches(Call& call) {
  NormalizePatchesArgs a;
  a.patches = call.in("patches", kU8, 2);
  const int64_t depth = a.patches.shape[1];
  call.check(depth % 3 == 0, Code::shape,
             "patches must have a multiple of 3 columns, an equal part for each channel, got " +
                 std::to_string(depth));
  a.mean = three(call, "mean", false);
  a.std = three(call, "std", true);
  a.out = call.result(one_of(call, kFloats, "f32, f16 or bf16"), a.patches.shape);
  return call.run(&Kernels::normalize_patches, a);
}

}  // namespace p2r::binding

// Crop, overlay, resample and patch layout: two kernels over all regions of a call.
//
//   rows_kernel     image -> middle: along x, for the regions whose width changes; only rows that
//   the
//                   next pass needs. u8 in scratch, some 50 MB for an 8K image, which the L2 holds.
//   columns_kernel  middle (or the image, where the width stays) -> result: along y, then the bytes
//   as
//                   they are, or through the table into the patch layout.
//
// A thread makes one pixel, three integer sums; a block 256 pixels of one region in row order,
// found by the first blocks of the regions. The overlay is looked up pixel by pixel, after the
// block has told which strokes meet its rows. Weights, regions and strokes travel in one upload.
#include <cstring>

#include "cuda/strokes.cuh"
#include "ops/crop_resample.h"
#include "ops/resample_plan.h"

namespace p2r::cuda {

namespace {

constexpr int kBlock = 256;

struct Pass {
  const int32_t *first, *weights;  // null: this axis is copied
  int32_t taps, stride;
};

struct Task {
  const uint8_t* image;
  int64_t image_height, image_width;
  int64_t x0, y0;
  int64_t height, width;  // of the result
  Pass x, y;
  uint8_t* middle;  // null where x is copied
  int64_t middle_first, middle_rows;
  const Stroke* strokes;
  int32_t stroke_count;
  int64_t out;  // offset of the result, in elements
  uint8_t* image_out;
};

struct Layout {
  int64_t patch, temporal, merge;
};

// The region that a block works for: the last that starts at or before it.
__device__ int task_of(const int64_t* starts, int tasks, int64_t block) {
  int low = 0, high = tasks;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (starts[middle] <= block)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// Pixel (y, x) of the crop.
__device__ __forceinline__ void crop_pixel(const Task& t, const int32_t* strokes, int64_t y,
                                           int64_t x, int32_t rgb[3]) {
  const int64_t sy = t.y0 + y, sx = t.x0 + x;
  if (sy < 0 || sy >= t.image_height || sx < 0 || sx >= t.image_width) {
    rgb[0] = rgb[1] = rgb[2] = 0;
    return;
  }
  const uint8_t* color =
      stroked(t.image + (sy * t.image_width + sx) * 3, t.strokes, strokes[0], strokes[1], sy, sx);
  for (int c = 0; c < 3; ++c) rgb[c] = color[c];
}

// 2^21 + a sum of at most 255 * 1.5 * 2^22 fits in 32 bits.
struct Sums {
  int32_t sum[3] = {1 << (kWeightBits - 1), 1 << (kWeightBits - 1), 1 << (kWeightBits - 1)};
  __device__ void add(const int32_t rgb[3], int32_t weight) {
    for (int c = 0; c < 3; ++c) sum[c] += rgb[c] * weight;
  }
  __device__ int32_t byte(int c) const {
    const int32_t v = sum[c] >> kWeightBits;
    return v < 0 ? 0 : v > 255 ? 255 : v;
  }
};

__global__ void __launch_bounds__(kBlock, 4)
    rows_kernel(const Task* tasks, const int64_t* starts, int count) {
  SMEM_ARRAY(int32_t, strokes, 2);
  const int index = task_of(starts, count, blockIdx.x);
  const Task& t = tasks[index];
  const int64_t begin = (int64_t{blockIdx.x} - starts[index]) * kBlock;
  const int64_t top = begin / t.width, bottom = (begin + kBlock - 1) / t.width + 1;
  const int64_t shift = t.middle_first + t.y0;  // of a row of the middle to one of the image
  strokes_in_rows(t.strokes, t.stroke_count, top + shift, bottom + shift, strokes);

  const int64_t p = begin + threadIdx.x;
  const int64_t y = p / t.width, x = p % t.width;
  if (y >= t.middle_rows) return;
  const int32_t first = t.x.first[x];
  const int32_t* weights = t.x.weights + x * t.x.stride;
  Sums sums;
  int32_t rgb[3];
  for (int32_t i = 0; i < t.x.taps; ++i) {
    crop_pixel(t, strokes, t.middle_first + y, first + i, rgb);
    sums.add(rgb, weights[i]);
  }
  for (int c = 0; c < 3; ++c) t.middle[p * 3 + c] = static_cast<uint8_t>(sums.byte(c));
}

// T: uint8_t for images, uint32_t or uint16_t for the bits of normalised values.
template <class T>
__global__ void __launch_bounds__(kBlock, 4)
    columns_kernel(const Task* tasks, const int64_t* starts, int count, const T* table, T* out,
                   Layout layout) {
  SMEM_ARRAY(int32_t, strokes, 2);
  const int index = task_of(starts, count, blockIdx.x);
  const Task& t = tasks[index];
  const int64_t begin = (int64_t{blockIdx.x} - starts[index]) * kBlock;
  if (!t.middle) {
    int64_t top = begin / t.width, bottom = (begin + kBlock - 1) / t.width + 1;
    if (bottom > t.height) bottom = t.height;
    if (t.y.first) {
      top = t.y.first[top];
      bottom = t.y.first[bottom - 1] + t.y.taps;
    }
    strokes_in_rows(t.strokes, t.stroke_count, top + t.y0, bottom + t.y0, strokes);
  }

  const int64_t p = begin + threadIdx.x;
  const int64_t y = p / t.width, x = p % t.width;
  if (y >= t.height) return;
  auto read = [&](int64_t row, int32_t rgb[3]) {
    if (!t.middle) return crop_pixel(t, strokes, row, x, rgb);
    const uint8_t* from = t.middle + ((row - t.middle_first) * t.width + x) * 3;
    for (int c = 0; c < 3; ++c) rgb[c] = from[c];
  };
  int32_t rgb[3];
  if (t.y.first) {
    const int32_t first = t.y.first[y];
    const int32_t* weights = t.y.weights + y * t.y.stride;
    Sums sums;
    for (int32_t i = 0; i < t.y.taps; ++i) {
      read(first + i, rgb);
      sums.add(rgb, weights[i]);
    }
    for (int c = 0; c < 3; ++c) rgb[c] = sums.byte(c);
  } else {
    read(y, rgb);
  }

  if constexpr (sizeof(T) == 1) {
    for (int c = 0; c < 3; ++c) t.image_out[p * 3 + c] = static_cast<uint8_t>(rgb[c]);
  } else {
    const int64_t patch = layout.patch, merge = layout.merge, plane = patch * patch;
    const int64_t py = y / patch, px = x / patch, columns = t.width / patch;
    const int64_t row = ((py / merge) * (columns / merge) + px / merge) * merge * merge +
                        (py % merge) * merge + px % merge;
    T* to = out + t.out + row * 3 * layout.temporal * plane + (y % patch) * patch + x % patch;
    for (int c = 0; c < 3; ++c) {
      const T value = table[c * 256 + rgb[c]];
      for (int64_t k = 0; k < layout.temporal; ++k) to[(c * layout.temporal + k) * plane] = value;
    }
  }
}

// Host data on its way to one block of device memory.
class Parcel {
 public:
  template <class T>
  size_t add(const std::vector<T>& values) {
    const size_t at = (bytes_.size() + 15) / 16 * 16;
    bytes_.resize(at + values.size() * sizeof(T));
    if (!values.empty()) std::memcpy(&bytes_[at], values.data(), values.size() * sizeof(T));
    return at;
  }
  template <class T>
  void set(size_t at, const std::vector<T>& values) {
    std::memcpy(&bytes_[at], values.data(), values.size() * sizeof(T));
  }
  size_t size() const { return bytes_.size(); }
  const char* data() const { return bytes_.data(); }

 private:
  std::vector<char> bytes_;
};

template <class T>
void run(const std::vector<In>& images, const ResamplePlan& plan, const std::vector<Out>* image_out,
         T* out, const std::vector<char>& table, Layout layout, Device& device) {
  const int count = static_cast<int>(plan.regions.size());
  if (!count) return;

  Parcel parcel;
  std::map<const Axis*, std::pair<size_t, size_t>> axes;
  for (const auto& [key, axis] : plan.axes)
    if (!axis.copy) axes[&axis] = {parcel.add(axis.first), parcel.add(axis.weights)};
  std::vector<size_t> strokes;
  for (const auto& list : plan.strokes) strokes.push_back(parcel.add(list));
  const size_t table_at = parcel.add(table);

  std::vector<Task> tasks(count);
  std::vector<int64_t> row_starts(count), column_starts(count), middle_at(count);
  int64_t row_blocks = 0, column_blocks = 0, middle_bytes = 0, elements = 0;
  for (int i = 0; i < count; ++i) {
    const RegionPlan& r = plan.regions[i];
    Task& t = tasks[i];
    row_starts[i] = row_blocks;
    column_starts[i] = column_blocks;
    middle_at[i] = middle_bytes;
    t.out = elements;
    t.middle_first = r.y->copy ? 0 : r.y->first.front();
    t.middle_rows = r.y->copy ? r.height : r.y->first.back() + r.y->taps - t.middle_first;
    if (!r.x->copy) {
      row_blocks += ceil_div(t.middle_rows * r.width, kBlock);
      middle_bytes += t.middle_rows * r.width * 3;
    }
    column_blocks += ceil_div(r.height * r.width, kBlock);
    elements += r.height * r.width * 3 * layout.temporal;
  }
  const size_t rows_at = parcel.add(row_starts), columns_at = parcel.add(column_starts);
  const size_t tasks_at = parcel.add(tasks);

  Scratch scratch = device.scratch(parcel.size()), middle = device.scratch(middle_bytes);
  char* base = scratch.as<char>();
  auto pass = [&](const Axis* axis) -> Pass {
    if (axis->copy) return {nullptr, nullptr, 1, 0};
    const auto [first, weights] = axes.at(axis);
    return {reinterpret_cast<const int32_t*>(base + first),
            reinterpret_cast<const int32_t*>(base + weights), static_cast<int32_t>(axis->taps),
            static_cast<int32_t>(axis->stride)};
  };
  for (int i = 0; i < count; ++i) {
    const RegionPlan& r = plan.regions[i];
    Task& t = tasks[i];
    t.image = images[r.image].as<const uint8_t>();
    t.image_height = images[r.image].shape[0];
    t.image_width = images[r.image].shape[1];
    t.x0 = r.x0;
    t.y0 = r.y0;
    t.height = r.height;
    t.width = r.width;
    t.x = pass(r.x);
    t.y = pass(r.y);
    t.middle = r.x->copy ? nullptr : middle.as<uint8_t>() + middle_at[i];
    t.strokes = reinterpret_cast<const Stroke*>(base + strokes[r.image]);
    t.stroke_count = r.overlay ? static_cast<int32_t>(plan.strokes[r.image].size()) : 0;
    t.image_out = image_out ? (*image_out)[i].template as<uint8_t>() : nullptr;
  }
  parcel.set(tasks_at, tasks);
  device.upload(base, parcel.data(), parcel.size());

  const Task* on_device = reinterpret_cast<const Task*>(base + tasks_at);
  if (row_blocks)
    launch(rows_kernel, static_cast<unsigned>(row_blocks), kBlock, 0, stream_of(device), on_device,
           reinterpret_cast<const int64_t*>(base + rows_at), count);
  launch(columns_kernel<T>, static_cast<unsigned>(column_blocks), kBlock, 0, stream_of(device),
         on_device, reinterpret_cast<const int64_t*>(base + columns_at), count,
         reinterpret_cast<const T*>(base + table_at), out, layout);
}

}  // namespace

void crop_resample(const CropResampleArgs& a, Device& device) {
  const ResamplePlan plan(a.images, a.regions, a.filter, a.boxes, a.colors, a.line_width);
  run(a.images, plan, &a.out, static_cast<uint8_t*>(nullptr), {}, {1, 1, 1}, device);
}

void pixel_values(const PixelValuesArgs& a, Device& device) {
  const ResamplePlan plan(a.images, a.regions, a.filter, a.boxes, a.colors, a.line_width);
  const std::vector<char> table = pixel_table(a.mean, a.std, a.out.dtype);
  const Layout layout = {a.patch, a.temporal, a.merge};
  if (a.out.dtype == DType::f32)
    run(a.images, plan, nullptr, a.out.as<uint32_t>(), table, layout, device);
  else
    run(a.images, plan, nullptr, a.out.as<uint16_t>(), table, layout, device);
}

}  // namespace p2r::cuda

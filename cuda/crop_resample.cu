// Crop, overlay, resample and patch layout: two kernels over all regions of a call.
//
//   rows_kernel     image -> quads: along x, only rows that the next pass needs. A block makes
//   kTile
//                   outputs of four rows. It brings the pixels under them into shared memory, chunk
//                   by chunk, as planes of signed bytes (pixel - 128, the overlay laid over them),
//                   so that four taps of a channel are one word; a thread adds one output and
//                   channel of the four rows and stores their bytes as one word, a quad. Some 33 MB
//                   in scratch for an 8K image, which the L2 holds.
//   columns_kernel  quads -> result: along y, four rows a word, one pixel a thread; then the bytes
//   as
//                   they are, or through the table into the patch layout.
//
// A weight is cut into three signed bytes, k = k2 2^16 + k1 2^8 + k0, so that __dp4a multiplies
// four pixels at once; the three sums are shifted and added at the end, modulo 2^32, which is exact
// because the total fits. Pixels are taken as pixel - 128 to be signed; what that takes away, 128 Σ
// k, is part of the rounding term that comes with each output. An axis that is copied has one tap
// of 1.
//
// Prediction for an H200, nothing of it measured: 8K to 1920 x 1056 as bf16, some 90 µs.
// Bytes: 99.5 MB of image and 24 MB of result from and to memory, 26 µs at 4.8 TB/s; 25 MB of quads
// written and some 150 MB read, in the L2. Along x 8.3 M pixels of three channels in five words,
// 373 M __dp4a at 64 a clock and SM (132 SMs, 1.75 GHz): 25 µs; along y 6.1 M values in six words,
// 7 µs. Bringing 33 M pixels (7 % twice, at the tiles' edges) to shared memory byte by byte costs
// most: some 40 instructions a pixel are 45 µs at four warps' a clock, in part hidden behind the
// rest.
#include <algorithm>
#include <cstring>

#include "cuda/strokes.cuh"
#include "ops/crop_resample.h"
#include "ops/resample_plan.h"

namespace p2r::cuda {

namespace {

constexpr int kTile = 64, kRowsBlock = 3 * kTile, kChunk = 128;  // outputs; threads; words of a row
constexpr int kBlock = 256;

// Output o starts at word start[o] and takes `steps` of them; word i has its parts at
// words[(i 3 + part) out + o].
struct Pass {
  const int32_t *start, *words, *round;
  int32_t steps;
};

struct Task {
  const uint8_t* image;
  int64_t image_height, image_width;
  int64_t x0, y0;
  int64_t crop_height, crop_width;
  int64_t height, width;  // of the result
  Pass x, y;
  uint32_t* quads;  // [four rows][channel][width], from four rows `first` on
  int64_t first;
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

// A sum in three parts.
struct Sum {
  int32_t part[3] = {0, 0, 0};
  __device__ __forceinline__ void add(uint32_t pixels, const int32_t word[3]) {
    for (int k = 0; k < 3; ++k) part[k] = __dp4a(static_cast<int32_t>(pixels), word[k], part[k]);
  }
  __device__ __forceinline__ uint32_t byte(int32_t round) const {
    const uint32_t total = static_cast<uint32_t>(round) + static_cast<uint32_t>(part[0]) +
                           (static_cast<uint32_t>(part[1]) << 8) +
                           (static_cast<uint32_t>(part[2]) << 16);
    const int32_t v = static_cast<int32_t>(total) >> kWeightBits;
    return v < 0 ? 0 : v > 255 ? 255 : v;
  }
};

__global__ void __launch_bounds__(kRowsBlock)
    rows_kernel(const Task* tasks, const int64_t* starts, int count) {
  SMEM_ARRAY(int32_t, strokes, 2);
  SMEM_ARRAY(uint32_t, planes, 4 * 3 * kChunk);  // [row][channel][word]
  const int index = task_of(starts, count, blockIdx.x);
  const Task& t = tasks[index];
  const int64_t tiles = (t.width + kTile - 1) / kTile, block = int64_t{blockIdx.x} - starts[index];
  const int64_t quad = block / tiles, tile = block % tiles * kTile;
  const int64_t top = (t.first + quad) * 4;  // rows of the crop
  strokes_in_rows(t.strokes, t.stroke_count, top + t.y0, top + 4 + t.y0, strokes);

  const int c = threadIdx.x / kTile;
  const int64_t x = tile + threadIdx.x % kTile,
                last = (tile + kTile < t.width ? tile + kTile : t.width) - 1;
  const int64_t mine = x <= last ? x : last;
  const int32_t start = t.x.start[mine];
  const int32_t end_word = t.x.start[last] + t.x.steps;
  Sum sums[4];
  for (int32_t chunk = t.x.start[tile]; chunk < end_word; chunk += kChunk) {
    const int32_t words = end_word - chunk < kChunk ? end_word - chunk : kChunk;
    __syncthreads();
    uint8_t* bytes = reinterpret_cast<uint8_t*>(planes);
    for (int row = 0; row < 4; ++row) {
      const int64_t sy = t.y0 + top + row;
      const bool inside = sy >= 0 && sy < t.image_height && top + row < t.crop_height;
      for (int i = threadIdx.x; i < words * 4; i += kRowsBlock) {
        const int64_t cx = int64_t{chunk} * 4 + i, sx = t.x0 + cx;
        const bool is = inside && sx >= 0 && sx < t.image_width && cx < t.crop_width;
        const uint8_t* rgb = is ? stroked(t.image + (sy * t.image_width + sx) * 3, t.strokes,
                                          strokes[0], strokes[1], sy, sx)
                                : nullptr;
        for (int k = 0; k < 3; ++k)
          bytes[(row * 3 + k) * kChunk * 4 + i] = static_cast<uint8_t>((is ? rgb[k] : 0) ^ 0x80);
      }
    }
    __syncthreads();
    const int32_t from = start > chunk ? start : chunk;
    const int32_t to = start + t.x.steps < chunk + words ? start + t.x.steps : chunk + words;
    for (int32_t w = from; w < to; ++w) {
      int32_t word[3];
      for (int k = 0; k < 3; ++k)
        word[k] = t.x.words[(int64_t{w - start} * 3 + k) * t.width + mine];
      for (int row = 0; row < 4; ++row)
        sums[row].add(planes[(row * 3 + c) * kChunk + w - chunk], word);
    }
  }
  if (x > last) return;
  uint32_t out = 0;
  for (int row = 0; row < 4; ++row) out |= sums[row].byte(t.x.round[x]) << (8 * row);
  t.quads[(quad * 3 + c) * t.width + x] = out ^ 0x80808080u;
}

// T: uint8_t for images, uint32_t or uint16_t for the bits of normalised values.
template <class T>
__global__ void __launch_bounds__(kBlock)
    columns_kernel(const Task* tasks, const int64_t* starts, int count, const T* table, T* out,
                   Layout layout) {
  const int index = task_of(starts, count, blockIdx.x);
  const Task& t = tasks[index];
  const int64_t p = (int64_t{blockIdx.x} - starts[index]) * kBlock + threadIdx.x;
  const int64_t y = p / t.width, x = p % t.width;
  if (y >= t.height) return;
  const int32_t start = t.y.start[y], round = t.y.round[y];
  const uint32_t* quads = t.quads + (start - t.first) * 3 * t.width + x;
  Sum sums[3];
  for (int32_t i = 0; i < t.y.steps; ++i, quads += 3 * t.width) {
    int32_t word[3];
    for (int k = 0; k < 3; ++k) word[k] = t.y.words[(int64_t{i} * 3 + k) * t.height + y];
    for (int c = 0; c < 3; ++c) sums[c].add(quads[c * t.width], word);
  }

  if constexpr (sizeof(T) == 1) {
    for (int c = 0; c < 3; ++c) t.image_out[p * 3 + c] = static_cast<uint8_t>(sums[c].byte(round));
  } else {
    const int64_t patch = layout.patch, merge = layout.merge, plane = patch * patch;
    const int64_t py = y / patch, px = x / patch, columns = t.width / patch;
    const int64_t row = ((py / merge) * (columns / merge) + px / merge) * merge * merge +
                        (py % merge) * merge + px % merge;
    T* to = out + t.out + row * 3 * layout.temporal * plane + (y % patch) * patch + x % patch;
    for (int c = 0; c < 3; ++c) {
      const T value = table[c * 256 + sums[c].byte(round)];
      for (int64_t k = 0; k < layout.temporal; ++k) to[(c * layout.temporal + k) * plane] = value;
    }
  }
}

// An axis as Pass has it, on the host.
struct Words {
  std::vector<int32_t> start, words, round;
  int32_t steps = 1;

  explicit Words(const Axis& axis) {
    auto first = [&](int64_t o) { return axis.copy ? o : axis.first[o]; };
    auto weight = [&](int64_t o, int64_t tap) -> int32_t {
      if (axis.copy) return tap == 0 ? 1 << kWeightBits : 0;
      return tap >= 0 && tap < axis.taps ? axis.weights[o * axis.stride + tap] : 0;
    };
    for (int64_t o = 0; o < axis.out; ++o)
      steps = std::max(steps, static_cast<int32_t>((first(o) % 4 + axis.taps + 3) / 4));
    words.resize(axis.out * steps * 3);
    for (int64_t o = 0; o < axis.out; ++o) {
      start.push_back(static_cast<int32_t>(first(o) / 4));
      uint32_t sum = 0;
      for (int64_t i = 0; i < steps; ++i) {
        uint32_t parts[3] = {};
        for (int lane = 0; lane < 4; ++lane) {
          int32_t rest = weight(o, i * 4 + lane - first(o) % 4);
          sum += static_cast<uint32_t>(rest);
          for (uint32_t& part : parts) {
            const int8_t byte = static_cast<int8_t>(rest);
            part |= uint32_t{static_cast<uint8_t>(byte)} << (8 * lane);
            rest = (rest - byte) >> 8;
          }
        }
        for (int k = 0; k < 3; ++k)
          words[(i * 3 + k) * axis.out + o] = static_cast<int32_t>(parts[k]);
      }
      round.push_back(static_cast<int32_t>((1u << (kWeightBits - 1)) + 128 * sum));
    }
  }
};

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
  struct Place {
    size_t start, words, round;
    int32_t steps;
  };
  std::map<const Axis*, Place> axes;
  for (const auto& [key, axis] : plan.axes) {
    const Words words(axis);
    axes[&axis] = {parcel.add(words.start), parcel.add(words.words), parcel.add(words.round),
                   words.steps};
  }
  std::vector<size_t> strokes;
  for (const auto& list : plan.strokes) strokes.push_back(parcel.add(list));
  const size_t table_at = parcel.add(table);

  std::vector<Task> tasks(count);
  std::vector<int64_t> row_starts(count), column_starts(count), quads_at(count);
  int64_t row_blocks = 0, column_blocks = 0, words = 0, elements = 0;
  for (int i = 0; i < count; ++i) {
    const RegionPlan& r = plan.regions[i];
    Task& t = tasks[i];
    row_starts[i] = row_blocks;
    column_starts[i] = column_blocks;
    quads_at[i] = words;
    t.out = elements;
    t.first = (r.y->copy ? 0 : r.y->first.front()) / 4;
    // Every output takes `steps` words, also where the last of them lie behind the crop.
    const int64_t last = (r.y->copy ? r.height - 1 : r.y->first.back()) / 4;
    const int64_t rows = last + axes.at(r.y).steps - t.first;
    row_blocks += rows * ceil_div(r.width, kTile);
    words += rows * 3 * r.width;
    column_blocks += ceil_div(r.height * r.width, kBlock);
    elements += r.height * r.width * 3 * layout.temporal;
  }
  const size_t rows_at = parcel.add(row_starts), columns_at = parcel.add(column_starts);
  const size_t tasks_at = parcel.add(tasks);

  Scratch scratch = device.scratch(parcel.size()), quads = device.scratch(words * 4);
  char* base = scratch.as<char>();
  auto at = [&](size_t offset) { return reinterpret_cast<const int32_t*>(base + offset); };
  auto pass = [&](const Axis* axis) -> Pass {
    const Place& p = axes.at(axis);
    return {at(p.start), at(p.words), at(p.round), p.steps};
  };
  for (int i = 0; i < count; ++i) {
    const RegionPlan& r = plan.regions[i];
    Task& t = tasks[i];
    t.image = images[r.image].as<const uint8_t>();
    t.image_height = images[r.image].shape[0];
    t.image_width = images[r.image].shape[1];
    t.x0 = r.x0;
    t.y0 = r.y0;
    t.crop_height = r.crop_height();
    t.crop_width = r.crop_width();
    t.height = r.height;
    t.width = r.width;
    t.x = pass(r.x);
    t.y = pass(r.y);
    t.quads = quads.as<uint32_t>() + quads_at[i];
    t.strokes = reinterpret_cast<const Stroke*>(base + strokes[r.image]);
    t.stroke_count = r.overlay ? static_cast<int32_t>(plan.strokes[r.image].size()) : 0;
    t.image_out = image_out ? (*image_out)[i].template as<uint8_t>() : nullptr;
  }
  parcel.set(tasks_at, tasks);
  device.upload(base, parcel.data(), parcel.size());

  const Task* on_device = reinterpret_cast<const Task*>(base + tasks_at);
  launch(rows_kernel, static_cast<unsigned>(row_blocks), kRowsBlock, 0, stream_of(device),
         on_device, reinterpret_cast<const int64_t*>(base + rows_at), count);
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

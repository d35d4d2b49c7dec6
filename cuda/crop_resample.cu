// Crop, overlay, resample and patch layout, in two kernels over all regions of a call, each a
// separable pass in integers.
//
//   rows_kernel     image -> quads, horizontally, only the rows that the second pass needs. A block
//                   makes kTile outputs of four rows. It loads the pixels under them into shared
//                   memory, chunk by chunk, as planes of signed bytes (pixel - 128, with the
//                   overlay drawn), so that four taps of a channel are one word: by words and byte
//                   permutations where four pixels are inside of the image and no stroke is near; a
//                   thread computes one output of one channel for the four rows and stores these as
//                   one word, a quad. Quads are some 25 MB of scratch for 8K to a width of 1920,
//                   and stay in L2.
//   columns_kernel  quads -> result, vertically, four rows a word, one pixel a thread; then the
//                   bytes as images, or as patches, as they are or through the table of normalised
//                   values.
//   values_kernel   patches of bytes -> normalised values, in a call of its own: a warp a row and
//                   channel, four values a lane and step, by the table in shared memory.
//
// A weight is split into three signed bytes, k = k2 2^16 + k1 2^8 + k0, so that __dp4a multiplies
// four pixels at once; the three sums are shifted and added at the end, modulo 2^32, which is exact
// because the total fits. Pixels are taken as pixel - 128 to be signed; the rounding term of each
// output adds the missing 128 Σ k back. An axis of unchanged size has one tap of weight 1.
//
// Prediction for an H200, nothing of it measured: 8K to 1920 x 1056 as bf16, some 80 µs.
// Bytes: 99.5 MB of image read and 24 MB of result written, 26 µs at 4.8 TB/s; 25 MB of quads
// written and some 150 MB read, in L2. Horizontally 8.3 M pixels of three channels in five words,
// 373 M __dp4a at 64 a clock and SM (132 SMs, 1.75 GHz): 25 µs; vertically 6.1 M values in six
// words, 7 µs. Loading 33 M pixels (7 % twice, at the tiles' edges) into shared memory, four at a
// time, takes four loads of a word each, 384 bytes apart by warp or 12 turns of L1 for 128 pixels:
// 14 µs, and some 50 instructions for four pixels, 14 µs at four warps' a clock. Together 55 to 80
// µs, as copies and arithmetic overlap or do not. As u8 the result is half of bf16's and a quarter
// of f32's. values_kernel for the same image, 12.2 M values of bf16: 12 MB read and 24 MB written,
// 8 µs. Look-ups of 32 lanes in 32 banks take some 3.5 turns: 12.2 M at nine a clock and SM are 6
// µs, behind the copies. A block takes several rows (kMaxBlocks), to load its table once for them.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cuda/strokes.cuh"
#include "ops/crop_resample.h"
#include "ops/resample_plan.h"

namespace p2r::cuda {

namespace {

constexpr int kTile = 64;  // outputs of a row and channel that a block of rows_kernel makes
constexpr int kRowsBlock = 3 * kTile;  // its threads
constexpr int kChunk = 128;            // words of a row and channel in shared memory at a time
constexpr int kBlock = 256;
constexpr int kMaxBlocks = 2048;  // of values_kernel: twice what the largest chips hold at once

// The weights of one axis, four taps a word. Output o reads `steps` words of pixels from word
// start[o] on; byte k of word i's four weights is words[(3 i + k) out + o], for `out` outputs.
// round is the rounding term.
struct AxisWeights {
  const int32_t *start, *words, *round;
  int32_t steps;
};

struct RegionTask {
  const uint8_t* image;
  int64_t image_height, image_width;
  int64_t x0, y0;
  int64_t crop_height, crop_width;
  int64_t height, width;  // of the result
  AxisWeights x, y;
  uint32_t* quads;  // [quad of rows - first][channel][width]
  int64_t first;
  const Stroke* strokes;
  int32_t stroke_count;
  int64_t out;  // offset of the result, in elements
  uint8_t* image_out;
};

struct Layout {
  int64_t patch, temporal, merge;
};

// The region that a block belongs to: the last that starts at or before it.
__device__ int region_of(const int64_t* starts, int tasks, int64_t block) {
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

// Σ weight * pixel, a part for each byte of the weights.
struct FixedPointSum {
  int32_t part[3] = {0, 0, 0};
  __device__ __forceinline__ void add(uint32_t pixels, const int32_t word[3]) {
    for (int k = 0; k < 3; ++k) part[k] = __dp4a(static_cast<int32_t>(pixels), word[k], part[k]);
  }
  __device__ __forceinline__ uint32_t to_byte(int32_t round) const {
    const uint32_t total = static_cast<uint32_t>(round) + static_cast<uint32_t>(part[0]) +
                           (static_cast<uint32_t>(part[1]) << 8) +
                           (static_cast<uint32_t>(part[2]) << 16);
    const int32_t v = static_cast<int32_t>(total) >> kWeightBits;
    return v < 0 ? 0 : v > 255 ? 255 : v;
  }
};

// Four neighbouring pixels, as the four bytes of each channel. `rgb` may begin anywhere, but none
// of the aligned words that hold the pixels may reach beyond the image.
__device__ __forceinline__ void four_pixels(const uint8_t* rgb, uint32_t (&channel)[3]) {
  const uint32_t offset = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(rgb)) % 4;
  const uint32_t* words = reinterpret_cast<const uint32_t*>(rgb - offset);
  const uint32_t a = words[0], b = words[1], c = words[2], d = offset ? words[3] : 0;
  // r g b r, g b r g, b r g b
  const uint32_t x = __funnelshift_r(a, b, 8 * offset), y = __funnelshift_r(b, c, 8 * offset),
                 z = __funnelshift_r(c, d, 8 * offset);
  channel[0] = __byte_perm(__byte_perm(x, y, 0x0630), z, 0x5210);
  channel[1] = __byte_perm(__byte_perm(x, y, 0x0741), z, 0x6210);
  channel[2] = __byte_perm(__byte_perm(x, y, 0x0052), z, 0x7410);
}

__global__ void __launch_bounds__(kRowsBlock)
    rows_kernel(const RegionTask* tasks, const int64_t* starts, int count) {
  SMEM_ARRAY(int32_t, stroke_range, 2);
  SMEM_ARRAY(uint32_t, planes, 4 * 3 * kChunk);  // [row][channel][word]
  const int index = region_of(starts, count, blockIdx.x);
  const RegionTask& t = tasks[index];
  const uint32_t tiles = static_cast<uint32_t>(ceil_div(t.width, kTile));
  const uint32_t block = blockIdx.x - static_cast<uint32_t>(starts[index]);
  const int64_t quad = block / tiles, tile = int64_t{block % tiles} * kTile;
  const int64_t top = (t.first + quad) * 4;  // rows of the crop
  strokes_in_rows(t.strokes, t.stroke_count, top + t.y0, top + 4 + t.y0, stroke_range);
  const int32_t first_stroke = stroke_range[0], end_stroke = stroke_range[1];

  const int c = threadIdx.x / kTile;
  const int64_t x = tile + threadIdx.x % kTile,
                last = (tile + kTile < t.width ? tile + kTile : t.width) - 1;
  const int64_t clamped_x = x <= last ? x : last;
  const int32_t start = t.x.start[clamped_x];
  const int32_t end_word = t.x.start[last] + t.x.steps;
  FixedPointSum sums[4];

  // Copies: stores to shared memory might change what t refers to, so that the loop over pixels
  // would load it again for each.
  const uint8_t *image = t.image, *image_end = image + t.image_height * t.image_width * 3;
  const int64_t image_width = t.image_width, crop_width = t.crop_width;
  const int64_t x0 = t.x0, first_y = t.y0 + top;
  uint32_t rows_inside = 0;  // a bit each
  for (int row = 0; row < 4; ++row)
    if (first_y + row >= 0 && first_y + row < t.image_height && top + row < t.crop_height)
      rows_inside |= 1u << row;
  for (int32_t chunk = t.x.start[tile]; chunk < end_word; chunk += kChunk) {
    const int32_t words = end_word - chunk < kChunk ? end_word - chunk : kChunk;
    __syncthreads();
    for (int i = threadIdx.x; i < 4 * words; i += kRowsBlock) {
      const int row = i / words, word = i % words;
      const int64_t sy = first_y + row, cx = int64_t{chunk + word} * 4, sx = x0 + cx;
      const bool row_inside = rows_inside >> row & 1;
      const uint8_t* rgb = image + (sy * image_width + sx) * 3;
      uint32_t* to = planes + row * 3 * kChunk + word;
      uint32_t channel[3] = {};
      if (row_inside && first_stroke >= end_stroke && sx >= 0 && sx + 4 <= image_width &&
          cx + 4 <= crop_width && rgb - image >= 4 && image_end - rgb >= 16) {
        four_pixels(rgb, channel);
      } else if (row_inside) {
#pragma unroll 1
        for (int p = 0; p < 4; ++p)
          if (sx + p >= 0 && sx + p < image_width && cx + p < crop_width) {
            const uint8_t* color =
                pixel_color(rgb + 3 * p, t.strokes, first_stroke, end_stroke, sy, sx + p);
            for (int k = 0; k < 3; ++k) channel[k] |= uint32_t{color[k]} << (8 * p);
          }
      }
      for (int k = 0; k < 3; ++k) to[k * kChunk] = channel[k] ^ 0x80808080u;
    }
    __syncthreads();
    const int32_t from = start > chunk ? start : chunk;
    const int32_t to = start + t.x.steps < chunk + words ? start + t.x.steps : chunk + words;
    for (int32_t w = from; w < to; ++w) {
      int32_t word[3];
      for (int k = 0; k < 3; ++k)
        word[k] = t.x.words[(int64_t{w - start} * 3 + k) * t.width + clamped_x];
      for (int row = 0; row < 4; ++row)
        sums[row].add(planes[(row * 3 + c) * kChunk + w - chunk], word);
    }
  }
  if (x > last) return;
  uint32_t out = 0;
  for (int row = 0; row < 4; ++row) out |= sums[row].to_byte(t.x.round[x]) << (8 * row);
  t.quads[(quad * 3 + c) * t.width + x] = out ^ 0x80808080u;
}

// T: of images uint8_t; of patches uint32_t or uint16_t, the bits of normalised values, or uint8_t.
template <class T, bool kPatches>
__global__ void __launch_bounds__(kBlock)
    columns_kernel(const RegionTask* tasks, const int64_t* starts, int count, const T* table,
                   T* out, Layout layout) {
  const int index = region_of(starts, count, blockIdx.x);
  const RegionTask& t = tasks[index];
  const int64_t p = (int64_t{blockIdx.x} - starts[index]) * kBlock + threadIdx.x;
  const int64_t y = p / t.width, x = p % t.width;
  if (y >= t.height) return;
  const int32_t start = t.y.start[y], round = t.y.round[y];
  const uint32_t* quads = t.quads + (start - t.first) * 3 * t.width + x;
  FixedPointSum sums[3];
  for (int32_t i = 0; i < t.y.steps; ++i, quads += 3 * t.width) {
    int32_t word[3];
    for (int k = 0; k < 3; ++k) word[k] = t.y.words[(int64_t{i} * 3 + k) * t.height + y];
    for (int c = 0; c < 3; ++c) sums[c].add(quads[c * t.width], word);
  }

  if constexpr (!kPatches) {
    for (int c = 0; c < 3; ++c)
      t.image_out[p * 3 + c] = static_cast<uint8_t>(sums[c].to_byte(round));
  } else {
    const int64_t patch = layout.patch, merge = layout.merge, plane = patch * patch;
    const int64_t py = y / patch, px = x / patch, columns = t.width / patch;
    const int64_t row = ((py / merge) * (columns / merge) + px / merge) * merge * merge +
                        (py % merge) * merge + px % merge;
    T* to = out + t.out + row * 3 * layout.temporal * plane + (y % patch) * patch + x % patch;
    for (int c = 0; c < 3; ++c) {
      T value = static_cast<T>(sums[c].to_byte(round));
      if constexpr (sizeof(T) > 1) value = table[c * 256 + value];
      for (int64_t k = 0; k < layout.temporal; ++k) to[(c * layout.temporal + k) * plane] = value;
    }
  }
}

// A warp takes one channel of a row, `run` values, in steps of kVector a lane, which are aligned
// and divide it.
template <class T, int kVector>
__global__ void __launch_bounds__(kBlock)
    values_kernel(const uint8_t* patches, const T* table, T* out, int64_t runs, int64_t run) {
  SMEM_ARRAY(T, values, 3 * 256);
  for (int i = threadIdx.x; i < 3 * 256; i += kBlock) values[i] = table[i];
  __syncthreads();
  constexpr int kWarps = kBlock / 32;
  for (int64_t r = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32; r < runs;
       r += int64_t{gridDim.x} * kWarps) {
    const T* channel = values + r % 3 * 256;
    for (int64_t x = threadIdx.x % 32 * kVector; x < run; x += 32 * kVector) {
      const int64_t i = r * run + x;
      if constexpr (kVector == 1) {
        out[i] = channel[patches[i]];
      } else {
        using Vector = std::conditional_t<sizeof(T) == 4, uint4, uint2>;
        const uint32_t bytes = *reinterpret_cast<const uint32_t*>(patches + i);
        alignas(Vector) T v[kVector];
        for (int k = 0; k < kVector; ++k) v[k] = channel[bytes >> (8 * k) & 0xFF];
        *reinterpret_cast<Vector*>(out + i) = *reinterpret_cast<const Vector*>(v);
      }
    }
  }
}

template <class T>
void values_of(const NormalizePatchesArgs& a, const T* table, Device& device) {
  const uint8_t* patches = a.patches.as<const uint8_t>();
  T* out = a.out.as<T>();
  const int64_t runs = a.patches.shape[0] * 3, run = a.patches.shape[1] / 3;
  const unsigned blocks = std::min<unsigned>(blocks_for(runs * 32, kBlock), kMaxBlocks);
  const bool aligned = run % 4 == 0 && reinterpret_cast<uintptr_t>(patches) % 4 == 0 &&
                       reinterpret_cast<uintptr_t>(out) % (4 * sizeof(T)) == 0;
  launch(aligned ? values_kernel<T, 4> : values_kernel<T, 1>, blocks, kBlock, 0, stream_of(device),
         patches, table, out, runs, run);
}

// Makes AxisWeights' arrays on the host.
struct PackedWeights {
  std::vector<int32_t> start, words, round;
  int32_t steps = 1;

  explicit PackedWeights(const Axis& axis) {
    auto first = [&](int64_t o) { return axis.copy ? o : axis.first[o]; };
    auto weight = [&](int64_t o, int64_t tap) -> int32_t {
      if (axis.copy) return tap == 0 ? 1 << kWeightBits : 0;
      return tap >= 0 && tap < axis.taps ? axis.weights[o * axis.stride + tap] : 0;
    };
    for (int64_t o = 0; o < axis.out; ++o)
      steps = std::max(steps, static_cast<int32_t>(ceil_div(first(o) % 4 + axis.taps, 4)));
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
            const int8_t digit = static_cast<int8_t>(rest);
            part |= uint32_t{static_cast<uint8_t>(digit)} << (8 * lane);
            rest = (rest - digit) >> 8;
          }
        }
        for (int k = 0; k < 3; ++k)
          words[(i * 3 + k) * axis.out + o] = static_cast<int32_t>(parts[k]);
      }
      round.push_back(static_cast<int32_t>((1u << (kWeightBits - 1)) + 128 * sum));
    }
  }
};

// Host arrays packed for one upload: an array has the same offset here and in the device's block.
class UploadBuffer {
 public:
  template <class T>
  size_t add(const std::vector<T>& values) {
    const size_t at = round_up(static_cast<int64_t>(bytes_.size()), 16);
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

template <class T, bool kPatches>
void resample(const std::vector<In>& images, const ResamplePlan& plan,
              const std::vector<Out>* image_out, T* out, const std::vector<char>& table,
              Layout layout, Device& device) {
  const int count = static_cast<int>(plan.regions.size());
  if (!count) return;

  UploadBuffer uploads;
  struct Offsets {
    size_t start, words, round;
    int32_t steps;
  };
  std::map<const Axis*, Offsets> axes;
  for (const auto& [key, axis] : plan.axes) {
    const PackedWeights words(axis);
    axes[&axis] = {uploads.add(words.start), uploads.add(words.words), uploads.add(words.round),
                   words.steps};
  }
  std::vector<size_t> strokes;
  for (const auto& list : plan.strokes) strokes.push_back(uploads.add(list));
  const size_t table_at = uploads.add(table);

  std::vector<RegionTask> tasks(count);
  std::vector<int64_t> row_starts(count), column_starts(count), quads_at(count);
  int64_t row_blocks = 0, column_blocks = 0, words = 0, elements = 0;
  for (int i = 0; i < count; ++i) {
    const RegionPlan& r = plan.regions[i];
    RegionTask& t = tasks[i];
    row_starts[i] = row_blocks;
    column_starts[i] = column_blocks;
    quads_at[i] = words;
    t.out = elements;
    t.first = (r.y->copy ? 0 : r.y->first.front()) / 4;
    // Every output reads `steps` words, even if the last of them are outside the crop.
    const int64_t last = (r.y->copy ? r.height - 1 : r.y->first.back()) / 4;
    const int64_t rows = last + axes.at(r.y).steps - t.first;
    row_blocks += rows * ceil_div(r.width, kTile);
    words += rows * 3 * r.width;
    column_blocks += ceil_div(r.height * r.width, kBlock);
    elements += r.height * r.width * 3 * layout.temporal;
  }
  const size_t rows_at = uploads.add(row_starts), columns_at = uploads.add(column_starts);
  const size_t tasks_at = uploads.add(tasks);

  Scratch scratch = device.scratch(uploads.size()), quads = device.scratch(words * 4);
  char* base = scratch.as<char>();
  auto at = [&](size_t offset) { return reinterpret_cast<const int32_t*>(base + offset); };
  auto axis_weights = [&](const Axis* axis) -> AxisWeights {
    const Offsets& p = axes.at(axis);
    return {at(p.start), at(p.words), at(p.round), p.steps};
  };
  for (int i = 0; i < count; ++i) {
    const RegionPlan& r = plan.regions[i];
    RegionTask& t = tasks[i];
    t.image = images[r.image].as<const uint8_t>();
    t.image_height = images[r.image].shape[0];
    t.image_width = images[r.image].shape[1];
    t.x0 = r.x0;
    t.y0 = r.y0;
    t.crop_height = r.crop_height();
    t.crop_width = r.crop_width();
    t.height = r.height;
    t.width = r.width;
    t.x = axis_weights(r.x);
    t.y = axis_weights(r.y);
    t.quads = quads.as<uint32_t>() + quads_at[i];
    t.strokes = reinterpret_cast<const Stroke*>(base + strokes[r.image]);
    t.stroke_count = r.overlay ? static_cast<int32_t>(plan.strokes[r.image].size()) : 0;
    t.image_out = image_out ? (*image_out)[i].template as<uint8_t>() : nullptr;
  }
  uploads.set(tasks_at, tasks);
  device.upload(base, uploads.data(), uploads.size());

  const RegionTask* on_device = reinterpret_cast<const RegionTask*>(base + tasks_at);
  launch(rows_kernel, static_cast<unsigned>(row_blocks), kRowsBlock, 0, stream_of(device),
         on_device, reinterpret_cast<const int64_t*>(base + rows_at), count);
  launch(columns_kernel<T, kPatches>, static_cast<unsigned>(column_blocks), kBlock, 0,
         stream_of(device), on_device, reinterpret_cast<const int64_t*>(base + columns_at), count,
         reinterpret_cast<const T*>(base + table_at), out, layout);
}

}  // namespace

void crop_resample(const CropResampleArgs& a, Device& device) {
  const ResamplePlan plan(a.images, a.regions, a.filter, a.boxes, a.colors, a.line_width);
  resample<uint8_t, false>(a.images, plan, &a.out, nullptr, {}, {1, 1, 1}, device);
}

void pixel_values(const PixelValuesArgs& a, Device& device) {
  const ResamplePlan plan(a.images, a.regions, a.filter, a.boxes, a.colors, a.line_width);
  const std::vector<char> table = pixel_table(a.mean, a.std, a.out.dtype);
  const Layout layout = {a.patch, a.temporal, a.merge};
  auto patches = [&](auto* out) {
    using T = std::remove_pointer_t<decltype(out)>;
    resample<T, true>(a.images, plan, nullptr, out, table, layout, device);
  };
  if (a.out.dtype == DType::u8)
    patches(a.out.as<uint8_t>());
  else if (a.out.dtype == DType::f32)
    patches(a.out.as<uint32_t>());
  else
    patches(a.out.as<uint16_t>());
}

void normalize_patches(const NormalizePatchesArgs& a, Device& device) {
  if (!a.patches.size()) return;
  const std::vector<char> table = pixel_table(a.mean, a.std, a.out.dtype);
  Scratch scratch = device.scratch(table.size());
  device.upload(scratch.as<char>(), table.data(), table.size());
  if (a.out.dtype == DType::f32)
    values_of(a, scratch.as<const uint32_t>(), device);
  else
    values_of(a, scratch.as<const uint16_t>(), device);
}

}  // namespace p2r::cuda

// Crop, overlay, resample and patch layout in one pass over a region. Four rows at a time are split
// into planes, resampled along x into a ring buffer of quads (cpu/simd/resample.h) that stays in
// the cache, and combined along y from there; a band of rows of the result is then stored as
// patches or pixels. Large regions are divided into strips of rows, the tasks of the threads, and
// into tiles of columns where a strip would not fit a thread's share of the cache.
//
// Prediction (8K to 1920 x 1056, AVX-512 with VNNI, written before it was measured).
// Along x 24.9 M sums of 17 taps, five steps of four taps for 16 sums at a time: three products and
// a quarter of everything else per step, 31 M instructions, and 10 M to shift, add and narrow; the
// split 9 M; along y 6.1 M sums in six steps, 7 M; the tables and stores 5 M. 62 M instructions at
// some 3 a cycle and 4 GHz are 5 ms of one core or 2.6 ms of two. Memory: 99.5 MB in, 48.7 MB out,
// 2.6 ms at 57 GB/s. The two overlap in part: 4 ms.
// Measured on a Zen 5 (two cores, Node 20): 6.0 ms, and 10.2 ms on one core, of which the pass
// along x takes some 6 ms instead of 3.4; why is not known, as that machine counts no instructions.
#include "ops/crop_resample.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/device.h"
#include "cpu/simd/resample.h"
#include "ops/integer.h"
#include "ops/resample_plan.h"

namespace p2r::cpu {

namespace {

constexpr int64_t kPadding = 192;  // bytes that the SIMD kernels may access behind a row
// Of one thread's ring and band, and of its planes: together half of a common L2.
constexpr int64_t kTileBytes = 384 << 10, kPlaneBytes = 256 << 10;
constexpr int64_t kBand = 16;  // rows of the result that are stored together
// Results of more bytes use non-temporal stores: no cache would keep them until they are used.
constexpr int64_t kNontemporalBytes = 8 << 20;
constexpr int64_t kValuesGrain = 64 << 10;  // bytes of patches that a task normalises

// An axis that is copied has one tap of weight 1.
struct Taps {
  const Axis& axis;
  int64_t count() const { return axis.copy ? 1 : axis.taps; }
  int64_t first(int64_t x) const { return axis.copy ? x : axis.first[x]; }
  int32_t weight(int64_t x, int64_t tap) const {
    if (axis.copy) return tap == 0 ? 1 << kWeightBits : 0;
    return tap >= 0 && tap < axis.taps ? axis.weights[x * axis.stride + tap] : 0;
  }
};

// Four weights in the layout of pairs or of bytes; see cpu/simd/resample.h.
void write_words(const int32_t k[4], bool bytes, int64_t pitch, int32_t* to) {
  if (bytes) {
    uint32_t words[kByteWords] = {};
    for (int i = 0; i < 4; ++i) {
      int32_t rest = k[i];
      for (uint32_t& word : words) {
        const int8_t part = static_cast<int8_t>(rest);
        word |= uint32_t{static_cast<uint8_t>(part)} << (8 * i);
        rest = (rest - part) >> 8;
      }
    }
    for (int p = 0; p < kByteWords; ++p) to[p * pitch] = static_cast<int32_t>(words[p]);
    return;
  }
  auto pair = [](int32_t a, int32_t b) {
    return static_cast<int32_t>(uint32_t(a & 0xFFFF) | uint32_t(b) << 16);
  };
  to[0] = pair(k[0] & 4095, k[2] & 4095);
  to[pitch] = pair(k[1] & 4095, k[3] & 4095);
  to[2 * pitch] = pair(k[0] >> 12, k[2] >> 12);
  to[3 * pitch] = pair(k[1] >> 12, k[3] >> 12);
}

// Weights of an axis for the pass along x.
struct RowWeights {
  bool bytes = false;
  int64_t outputs = 1, steps = 1;  // of a block
  std::vector<int32_t> first, index, weights;

  RowWeights(const Axis& axis, int64_t lanes, bool vnni) {
    const Taps taps{axis};
    if (vnni) {
      bytes = true;
      int64_t reach = 0;  // words of a block's window
      for (int64_t x = 0; x < axis.out; ++x) {
        const int64_t from = taps.first(x) - taps.first(x / lanes * lanes);
        const int64_t words = ceil_div(from % 4 + taps.count(), 4);
        steps = std::max(steps, words);
        reach = std::max(reach, from / 4);
      }
      bytes = reach + steps <= 2 * lanes;
      if (!bytes) steps = 1;
    }
    outputs = bytes ? lanes : lanes / 4;
    if (!bytes) steps = ceil_div(taps.count(), 16);
    const int64_t words = bytes ? kByteWords : kPairWords;
    const int64_t blocks = ceil_div(axis.out, outputs);
    first.resize(bytes ? blocks : blocks * outputs);
    if (bytes) index.resize(blocks * lanes);
    weights.resize(blocks * steps * words * lanes);
    for (int64_t x = 0; x < blocks * outputs; ++x) {
      const int64_t block = x / outputs, lane = x % outputs, real = std::min(x, axis.out - 1);
      const int64_t from = taps.first(real), start = taps.first(block * outputs);
      if (bytes) {
        first[block] = static_cast<int32_t>(start);
        index[x] = static_cast<int32_t>((from - start) / 4);
      } else {
        first[x] = static_cast<int32_t>(from);
      }
      if (x != real) continue;
      // Lanes of this output per step; weights of 0 before its first tap.
      const int64_t width = bytes ? 1 : 4, before = bytes ? (from - start) % 4 : 0;
      for (int64_t tap = 0; tap < before + taps.count(); tap += 4) {
        int32_t k[4];
        for (int i = 0; i < 4; ++i) k[i] = taps.weight(x, tap + i - before);
        const int64_t step = tap / 4 / width;
        write_words(
            k, bytes, lanes,
            &weights[(block * steps + step) * words * lanes + lane * width + tap / 4 % width]);
      }
    }
  }
};

// Weights of an axis for the pass along y: words for each four rows of the crop.
struct ColumnWeights {
  int64_t words = 1, steps = 1;
  std::vector<int32_t> weights;

  ColumnWeights(const Axis& axis, bool vnni) : words(vnni ? kByteWords : kPairWords) {
    const Taps taps{axis};
    for (int64_t y = 0; y < axis.out; ++y)
      steps = std::max(steps, ceil_div(taps.first(y) % 4 + taps.count(), 4));
    weights.resize(axis.out * steps * words);
    for (int64_t y = 0; y < axis.out; ++y) {
      const int64_t before = taps.first(y) % 4;
      for (int64_t tap = 0; tap < before + taps.count(); tap += 4) {
        int32_t k[4];
        for (int i = 0; i < 4; ++i) k[i] = taps.weight(y, tap + i - before);
        write_words(k, vnni, 1, &weights[(y * steps + tap / 4) * words]);
      }
    }
  }
};

// One task: rows and columns of a region's result.
struct Tile {
  int64_t region, y0, y1, x0, x1;
};

struct Job {
  // Rows of the result are stored in bands, which do not cross multiples of `unit`; nor do tiles.
  Job(const std::vector<In>& images, const Ints& regions, Filter filter, const Ints& boxes,
      const Ints& colors, int64_t line_width, int64_t unit, const CpuDevice& cpu)
      : images(images),
        plan(images, regions, filter, boxes, colors, line_width),
        unit(unit),
        vnni(cpu.features().vnni) {
    const int64_t lanes = cpu.simd().vector_width();
    int64_t total = 0;
    auto work_of = [](const RegionPlan& r) {
      return r.crop_width() * r.crop_height() + r.width * r.height;
    };
    for (const RegionPlan& r : plan.regions) {
      total += work_of(r);
      rows.try_emplace(r.x, *r.x, lanes, vnni);
      columns.try_emplace(r.y, *r.y, vnni);
    }
    // Enough work in a task to be worth its scheduling, and enough tasks to balance the load.
    const int64_t share = std::max<int64_t>(total / (cpu.threads() * 8), 1 << 16);
    for (size_t i = 0; i < plan.regions.size(); ++i) {
      const RegionPlan& r = plan.regions[i];
      const Taps x{*r.x}, y{*r.y};
      const int64_t slots = columns.at(r.y).steps;
      const int64_t fit = std::min(kTileBytes / (12 * slots + 3 * kBand),
                                   (kPlaneBytes / 12 - x.count()) * r.width / r.crop_width());
      const int64_t tile_width = std::max(round_up(64, unit), fit / unit * unit);
      // Source rows that neighbouring strips both resample stay few compared to a strip's own.
      const int64_t shared = r.y->copy ? 0 : 8 * y.count() * r.height / r.crop_height();
      const int64_t parts = std::max<int64_t>(1, work_of(r) / share);
      const int64_t strip = round_up(std::max({ceil_div(r.height, parts), shared, kBand}), unit);
      for (int64_t y0 = 0; y0 < r.height; y0 += strip)
        for (int64_t x0 = 0; x0 < r.width; x0 += tile_width)
          tiles.push_back({static_cast<int64_t>(i), y0, std::min(y0 + strip, r.height), x0,
                           std::min(x0 + tile_width, r.width)});
      for (int64_t x0 = 0; x0 < r.width; x0 += tile_width) {
        const int64_t from = x0 / lanes * lanes, to = std::min(x0 + tile_width, r.width);
        const int64_t span = x.first(to - 1) + x.count() - x.first(from);
        plane_pitch = std::max(plane_pitch, round_up(span + kPadding, 64));
        quad_pitch = std::max(quad_pitch, round_up(to - from, 64));
      }
      ring_slots = std::max(ring_slots, slots);
    }
    const int64_t count = static_cast<int64_t>(tiles.size());
    grain = std::max<int64_t>(1, count / std::max<int64_t>(1, total / share));
    planes_bytes = 12 * plane_pitch;
    slot_bytes = 12 * quad_pitch;
    per_thread = planes_bytes + ring_slots * slot_bytes + kBand * 3 * quad_pitch +
                 round_up(ring_slots * 8, 64);
  }

  std::vector<In> images;
  ResamplePlan plan;
  std::map<const Axis*, RowWeights> rows;
  std::map<const Axis*, ColumnWeights> columns;
  std::vector<Tile> tiles;
  int64_t unit;
  bool vnni;
  int64_t grain = 1, plane_pitch = 0, quad_pitch = 0, ring_slots = 0;  // pitches in columns
  int64_t planes_bytes = 0, slot_bytes = 0, per_thread = 0;
};

// The source of columns [x0, x1) of a row of a region's crop: columns [left, right) of a row of the
// image, black beside them; null: all black.
struct Source {
  const uint8_t* row;
  int64_t y, left, right;
};

Source source_of(const Job& job, const RegionPlan& r, int64_t y, int64_t x0, int64_t x1) {
  const In& image = job.images[r.image];
  const int64_t height = image.shape[0], width = image.shape[1];
  const int64_t source_y = r.y0 + y;
  const int64_t left = std::clamp<int64_t>(r.x0 + x0, 0, width);
  const int64_t right = std::clamp<int64_t>(r.x0 + x1, left, width);
  if (source_y < 0 || source_y >= height || left == right) return {nullptr, 0, 0, 0};
  return {image.as<uint8_t>() + source_y * width * 3, source_y, left, right};
}

// Calls stroke(color, begin, end) for the columns of a source that a stroke covers, in order.
template <class F>
void for_strokes(const Job& job, const RegionPlan& r, const Source& source, F&& stroke) {
  if (!r.overlay || !source.row) return;
  for (const Stroke& s : job.plan.strokes[r.image]) {
    if (source.y < s.y0 || source.y >= s.y1) continue;
    const int64_t begin = std::max<int64_t>(s.x0, source.left);
    const int64_t end = std::min<int64_t>(s.x1, source.right);
    if (begin < end) stroke(s.color, begin, end);
  }
}

// Columns [x0, x1) of row y of a crop, as planes.
void read_planes(const Job& job, const RegionPlan& r, int64_t y, int64_t x0, int64_t x1,
                 const Simd& simd, uint8_t* planes, int64_t pitch) {
  const Source source = source_of(job, r, y, x0, x1);
  const int64_t origin = r.x0 + x0;
  if (source.row)
    simd.split_planes(source.row + source.left * 3, planes + (source.left - origin), pitch,
                      source.right - source.left);
  const int64_t black = source.row ? source.right - origin : 0;
  for (int c = 0; c < 3; ++c) {
    uint8_t* plane = planes + c * pitch;
    if (source.row) std::memset(plane, 0, source.left - origin);
    std::memset(plane + black, 0, x1 - x0 - black);
  }
  for_strokes(job, r, source, [&](const uint8_t* color, int64_t begin, int64_t end) {
    for (int c = 0; c < 3; ++c)
      std::memset(planes + c * pitch + (begin - origin), color[c], end - begin);
  });
}

// Columns [x0, x1) of row y of a crop, as pixels.
void read_pixels(const Job& job, const RegionPlan& r, int64_t y, int64_t x0, int64_t x1,
                 uint8_t* rgb) {
  const Source source = source_of(job, r, y, x0, x1);
  const int64_t origin = r.x0 + x0, bytes = (x1 - x0) * 3;
  if (!source.row) {
    std::memset(rgb, 0, bytes);
    return;
  }
  const int64_t before = (source.left - origin) * 3, end = (source.right - origin) * 3;
  std::memset(rgb, 0, before);
  std::memcpy(rgb + before, source.row + source.left * 3, end - before);
  std::memset(rgb + end, 0, bytes - end);
  for_strokes(job, r, source, [&](const uint8_t* color, int64_t begin, int64_t end) {
    for (int64_t x = begin; x < end; ++x) std::memcpy(rgb + (x - origin) * 3, color, 3);
  });
}

// Rows of a tile's result as planes, from column `x0` of the region on: [row][channel][x].
struct Band {
  const Tile& tile;
  int64_t y0, y1;
  const uint8_t* rows;
  int64_t row_pitch, plane_pitch;
};

// Calls emit(band) for the rows of the tile's result, in order.
template <class Emit>
void walk(const Job& job, const Tile& tile, const Simd& simd, char* scratch, Emit&& emit) {
  const RegionPlan& r = job.plan.regions[tile.region];
  const RowWeights& rows = job.rows.at(r.x);
  const ColumnWeights& columns = job.columns.at(r.y);
  const Taps ax{*r.x}, ay{*r.y};
  uint8_t* planes = reinterpret_cast<uint8_t*>(scratch);
  uint8_t* ring = planes + job.planes_bytes;
  uint8_t* band = ring + job.ring_slots * job.slot_bytes;
  const uint8_t** quads = reinterpret_cast<const uint8_t**>(band + kBand * 3 * job.quad_pitch);
  const bool copy = r.x->copy && r.y->copy;

  // Whole blocks, starting with the one that contains x0.
  const int64_t block = tile.x0 / rows.outputs, from = block * rows.outputs;
  const int64_t blocks = ceil_div(tile.x1, rows.outputs) - block;
  const int64_t pitch = round_up(blocks * rows.outputs, 64);
  const int64_t begin = ax.first(from), end = ax.first(tile.x1 - 1) + ax.count();
  const int64_t words = rows.bytes ? kByteWords : kPairWords;
  const int64_t lanes = rows.bytes ? rows.outputs : rows.outputs * 4;
  ResampleRows a;
  a.planes = planes;
  a.row_pitch = 3 * job.plane_pitch;
  a.plane_pitch = job.plane_pitch;
  a.blocks = blocks;
  a.steps = rows.steps;
  a.first = rows.first.data() + (rows.bytes ? block : from);
  a.origin = begin;
  a.index = rows.index.data() + (rows.bytes ? from : 0);
  a.weights = rows.weights.data() + block * rows.steps * words * lanes;
  a.quad_pitch = pitch * 4;
  a.prefetch_pitch = job.images[r.image].shape[1] * 3;
  const auto resample_rows = rows.bytes ? simd.resample_rows_vnni : simd.resample_rows;
  const auto resample_column = job.vnni ? simd.resample_column_vnni : simd.resample_column;

  int64_t next_quad = 0;  // the next four rows to enter the ring
  for (int64_t y0 = tile.y0, y1; y0 < tile.y1; y0 = y1) {
    y1 = std::min({tile.y1, y0 + kBand, (y0 / job.unit + 1) * job.unit});
    for (int64_t y = y0; y < y1; ++y) {
      uint8_t* to = band + (y - y0) * 3 * pitch;
      if (copy) {
        read_planes(job, r, y, from, tile.x1, simd, to, pitch);
        continue;
      }
      const int64_t first = ay.first(y) / 4, last = (ay.first(y) + ay.count() - 1) / 4;
      for (next_quad = std::max(next_quad, first); next_quad <= last; ++next_quad) {
        // The weights of rows behind the crop's end are 0.
        for (int64_t row = 0; row < 4 && 4 * next_quad + row < r.crop_height(); ++row)
          read_planes(job, r, 4 * next_quad + row, begin, end, simd, planes + row * a.row_pitch,
                      a.plane_pitch);
        const Source next = source_of(job, r, 4 * next_quad + 4, begin, end);
        a.prefetch = next.row ? next.row + next.left * 3 : nullptr;
        a.prefetch_bytes = (next.right - next.left) * 3;
        a.quads = ring + next_quad % job.ring_slots * job.slot_bytes;
        resample_rows(&a);
      }
      for (int64_t i = first; i <= last; ++i)
        quads[i - first] = ring + i % job.ring_slots * job.slot_bytes;
      resample_column(quads, to, 3 * pitch, &columns.weights[y * columns.steps * columns.words],
                      last - first + 1);
    }
    emit(Band{tile, y0, y1, band + (tile.x0 - from), 3 * pitch, pitch});
  }
}

template <class Run>
void launch_job(CpuDevice& cpu, std::shared_ptr<const Job> job, Run run) {
  Scratch scratch = cpu.scratch(job->per_thread * cpu.threads());
  char* memory = scratch.as<char>();
  const int64_t count = static_cast<int64_t>(job->tiles.size()), grain = job->grain;
  cpu.launch(count, grain,
             [job = std::move(job), memory, run, &simd = cpu.simd()](int64_t begin, int64_t end,
                                                                     int thread) {
               for (int64_t i = begin; i < end; ++i)
                 run(*job, job->tiles[i], simd, memory + thread * job->per_thread);
             });
}

}  // namespace

void crop_resample(const CropResampleArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  auto job = std::make_shared<Job>(a.images, a.regions, a.filter, a.boxes, a.colors, a.line_width,
                                   kBand, cpu);
  launch_job(cpu, std::move(job),
             [out = a.out](const Job& job, const Tile& tile, const Simd& simd, char* scratch) {
               const RegionPlan& r = job.plan.regions[tile.region];
               uint8_t* to = out[tile.region].as<uint8_t>() + tile.x0 * 3;
               if (r.x->copy && r.y->copy) {
                 for (int64_t y = tile.y0; y < tile.y1; ++y)
                   read_pixels(job, r, y, tile.x0, tile.x1, to + y * r.width * 3);
                 return;
               }
               walk(job, tile, simd, scratch, [&](const Band& band) {
                 for (int64_t y = band.y0; y < band.y1; ++y)
                   simd.join_planes(band.rows + (y - band.y0) * band.row_pitch, band.plane_pitch,
                                    to + y * r.width * 3, tile.x1 - tile.x0);
               });
             });
}

void pixel_values(const PixelValuesArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  auto job = std::make_shared<Job>(a.images, a.regions, a.filter, a.boxes, a.colors, a.line_width,
                                   a.patch, cpu);
  std::vector<int64_t> start;  // of each region's patches, in elements
  int64_t elements = 0;
  for (const RegionPlan& r : job->plan.regions) {
    start.push_back(elements);
    elements += r.height * r.width * 3 * a.temporal;
  }
  PatchRow layout;
  layout.patch = a.patch;
  layout.temporal = a.temporal;
  layout.merge = a.merge;
  layout.value_bytes = static_cast<int>(size_of(a.out.dtype));
  layout.nontemporal = static_cast<int64_t>(a.out.bytes()) > kNontemporalBytes &&
                       reinterpret_cast<uintptr_t>(a.out.data) % 64 == 0;
  launch_job(
      cpu, std::move(job),
      [out = a.out.as<char>(), start = std::move(start), layout,
       table = pixel_table(a.mean, a.std, a.out.dtype)](const Job& job, const Tile& tile,
                                                        const Simd& simd, char* scratch) {
        walk(job, tile, simd, scratch, [&](const Band& band) {
          PatchRow row = layout;
          const int64_t patch = row.patch, merge = row.merge, py = band.y0 / patch;
          const int64_t columns = job.plan.regions[tile.region].width / patch;
          const int64_t depth = 3 * row.temporal * patch * patch;
          const int64_t first_row = (py / merge * (columns / merge) * merge + py % merge) * merge;
          row.rows = band.rows;
          row.row_pitch = band.row_pitch;
          row.plane_pitch = band.plane_pitch;
          row.lines = band.y1 - band.y0;
          row.first = tile.x0 / patch;
          row.count = (tile.x1 - tile.x0) / patch;
          row.table = table.data();
          row.out = out + (start[tile.region] + first_row * depth + band.y0 % patch * patch) *
                              row.value_bytes;
          simd.patch_row(&row);
        });
      });
}

void normalize_patches(const NormalizePatchesArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t rows = a.patches.shape[0], depth = a.patches.shape[1];
  if (!a.patches.size()) return;
  const int64_t grain = std::max<int64_t>(1, kValuesGrain / depth);
  const bool nontemporal = static_cast<int64_t>(a.out.bytes()) > kNontemporalBytes &&
                           depth / 3 % 32 == 0 && reinterpret_cast<uintptr_t>(a.out.data) % 64 == 0;
  cpu.launch(rows, grain,
             [a, depth, nontemporal, table = pixel_table(a.mean, a.std, a.out.dtype),
              &simd = cpu.simd()](int64_t begin, int64_t end, int) {
               PatchValues values;
               values.patches = a.patches.as<const uint8_t>() + begin * depth;
               values.rows = end - begin;
               values.run = depth / 3;
               values.table = table.data();
               values.value_bytes = static_cast<int>(size_of(a.out.dtype));
               values.out = a.out.element(begin * depth);
               values.nontemporal = nontemporal;
               simd.patch_values(&values);
             });
}

}  // namespace p2r::cpu

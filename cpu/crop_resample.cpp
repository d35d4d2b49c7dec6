// Crop, overlay, resample and patch layout in one walk over a region: rows are read where they lie,
// resampled along x into a ring of rows that stays in the cache, and combined along y from there,
// one row of the result at a time. Large regions are cut into strips of rows, which threads take
// one by one; small regions are taken whole.
#include "ops/crop_resample.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/device.h"
#include "ops/resample_plan.h"

namespace p2r::cpu {

namespace {

constexpr int64_t kSlack = 64;  // that the SIMD kernels may touch behind a row

struct Strip {
  int64_t region, begin, end;  // rows of the result
};

struct Job {
  Job(const std::vector<In>& images, const Ints& regions, Filter filter, const Ints& boxes,
      const Ints& colors, int64_t line_width, int threads)
      : images(images), plan(images, regions, filter, boxes, colors, line_width) {
    std::vector<int64_t> work;
    int64_t total = 0;
    for (const RegionPlan& r : plan.regions) {
      work.push_back(r.crop_width() * r.crop_height() + r.width * r.height);
      total += work.back();
    }
    // Enough work in a chunk to be worth handing out, and enough chunks to share it evenly.
    const int64_t share = std::max<int64_t>(total / (threads * 8), 1 << 16);
    for (size_t i = 0; i < plan.regions.size(); ++i) {
      const RegionPlan& r = plan.regions[i];
      // The rows that neighbouring strips both need stay few against the rows that they own.
      const int64_t shared = r.y->copy ? 0 : 8 * r.y->taps * r.height / r.crop_height();
      const int64_t parts = std::max<int64_t>(1, work[i] / share);
      const int64_t rows = std::max((r.height + parts - 1) / parts, std::max<int64_t>(shared, 16));
      for (int64_t y = 0; y < r.height; y += rows)
        strips.push_back({static_cast<int64_t>(i), y, std::min(y + rows, r.height)});
      crop_bytes = std::max(crop_bytes, padded(r.crop_width()));
      taps = std::max(taps, r.y->taps);
      ring_bytes = std::max(ring_bytes, padded(r.width) * r.y->taps);
      row_bytes = std::max(row_bytes, padded(r.width));
    }
    const int64_t count = static_cast<int64_t>(strips.size());
    grain = std::max<int64_t>(1, count / std::max<int64_t>(1, total / share));
    per_thread = crop_bytes + ring_bytes + row_bytes + (2 * taps * 8 + 63) / 64 * 64;
  }

  static int64_t padded(int64_t pixels) { return (pixels * 3 + kSlack + 63) / 64 * 64; }

  std::vector<In> images;
  ResamplePlan plan;
  std::vector<Strip> strips;
  int64_t grain = 1, crop_bytes = 0, ring_bytes = 0, row_bytes = 0, taps = 0, per_thread = 0;
};

// Row y of a region's crop: where it lies in the image when nothing has to be added, else in
// `buffer`. What is returned can be read kSlack bytes beyond its end.
const uint8_t* crop_row(const Job& job, const RegionPlan& r, int64_t y, bool slack,
                        uint8_t* buffer) {
  const In& image = job.images[r.image];
  const int64_t height = image.shape[0], width = image.shape[1];
  const int64_t source_y = r.y0 + y;
  const bool inside = source_y >= 0 && source_y < height;
  const int64_t left = std::max<int64_t>(r.x0, 0), right = std::min(r.x1, width);
  const int64_t bytes = r.crop_width() * 3;
  if (!inside || left >= right) {
    std::memset(buffer, 0, bytes);
    return buffer;
  }
  const uint8_t* row = image.as<uint8_t>() + source_y * width * 3;
  auto crosses = [&](const Stroke& s) {
    return source_y >= s.y0 && source_y < s.y1 && s.x0 < right && s.x1 > left;
  };
  const std::vector<Stroke>& strokes = job.plan.strokes[r.image];
  const bool drawn = r.overlay && std::any_of(strokes.begin(), strokes.end(), crosses);
  const int64_t behind = (height * width - source_y * width - right) * 3;
  if (!drawn && left == r.x0 && right == r.x1 && (!slack || behind >= kSlack))
    return row + r.x0 * 3;

  std::memset(buffer, 0, (left - r.x0) * 3);
  std::memcpy(buffer + (left - r.x0) * 3, row + left * 3, (right - left) * 3);
  std::memset(buffer + (right - r.x0) * 3, 0, (r.x1 - right) * 3);
  if (drawn)
    for (const Stroke& s : strokes)
      if (crosses(s)) {
        const int64_t end = std::min<int64_t>(s.x1, right);
        for (int64_t x = std::max<int64_t>(s.x0, left); x < end; ++x)
          std::memcpy(buffer + (x - r.x0) * 3, s.color, 3);
      }
  return buffer;
}

// Calls emit(y, row) for each row of the strip's result, in order.
template <class Emit>
void walk(const Job& job, const Strip& strip, const Simd& simd, char* scratch, Emit&& emit) {
  const RegionPlan& r = job.plan.regions[strip.region];
  const Axis &ax = *r.x, &ay = *r.y;
  uint8_t* crop = reinterpret_cast<uint8_t*>(scratch);
  uint8_t* ring = crop + job.crop_bytes;
  uint8_t* result = ring + job.ring_bytes;
  const uint8_t** rows = reinterpret_cast<const uint8_t**>(result + job.row_bytes);
  const int64_t pitch = Job::padded(r.width);

  // A row of the crop, resampled along x.
  auto middle = [&](int64_t y, uint8_t* slot) -> const uint8_t* {
    if (ax.copy) return crop_row(job, r, y, false, slot);
    simd.resample_row(crop_row(job, r, y, true, crop), slot, r.width, ax.first.data(),
                      ax.weights.data(), ax.stride);
    return slot;
  };

  if (ay.copy) {
    for (int64_t y = strip.begin; y < strip.end; ++y) emit(y, middle(y, ring));
    return;
  }
  // Slot i holds the row y with y mod taps = i; a window of `taps` rows is then all slots, and its
  // rows in order are the slots from first mod taps on.
  const int64_t taps = ay.taps;
  const uint8_t** slots = rows + taps;
  int64_t have = ay.first[strip.begin];
  for (int64_t y = strip.begin; y < strip.end; ++y) {
    const int64_t first = ay.first[y];
    have = std::max(have, first);
    for (; have < first + taps; ++have)
      slots[have % taps] = middle(have, ring + have % taps * pitch);
    for (int64_t t = 0; t < taps; ++t) rows[t] = slots[(first + t) % taps];
    simd.resample_column(rows, result, r.width * 3, &ay.weights[y * ay.stride], taps);
    emit(y, result);
  }
}

template <class Emit>
void launch_job(CpuDevice& cpu, std::shared_ptr<const Job> job, Emit emit) {
  Scratch scratch = cpu.scratch(job->per_thread * cpu.threads());
  char* memory = scratch.as<char>();
  const int64_t count = static_cast<int64_t>(job->strips.size()), grain = job->grain;
  cpu.launch(count, grain,
             [job = std::move(job), memory, emit, &simd = cpu.simd()](int64_t begin, int64_t end,
                                                                      int thread) {
               for (int64_t i = begin; i < end; ++i) {
                 const Strip& s = job->strips[i];
                 walk(*job, s, simd, memory + thread * job->per_thread,
                      [&](int64_t y, const uint8_t* row) { emit(*job, s.region, y, row); });
               }
             });
}

// Spreads a row of pixels over the patches of its row of patches.
template <class T>
void patch_row(const T* table, const uint8_t* row, T* out, int64_t columns, int64_t patch,
               int64_t temporal, int64_t merge, int64_t y) {
  const int64_t py = y / patch, block = merge * merge;
  const int64_t depth = 3 * temporal * patch * patch, plane = patch * patch;
  T* line = out + (y % patch) * patch;
  for (int64_t px = 0; px < columns; ++px) {
    const int64_t index =
        ((py / merge) * (columns / merge) + px / merge) * block + (py % merge) * merge + px % merge;
    for (int c = 0; c < 3; ++c) {
      const T* values = table + c * 256;
      const uint8_t* p = row + px * patch * 3 + c;
      T* to = line + index * depth + c * temporal * plane;
      for (int64_t x = 0; x < patch; ++x) to[x] = values[p[x * 3]];
      if (temporal == 2) std::memcpy(to + plane, to, patch * sizeof(T));
    }
  }
}

}  // namespace

void crop_resample(const CropResampleArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  launch_job(cpu,
             std::make_shared<Job>(a.images, a.regions, a.filter, a.boxes, a.colors, a.line_width,
                                   cpu.threads()),
             [out = a.out](const Job& job, int64_t region, int64_t y, const uint8_t* row) {
               const int64_t bytes = job.plan.regions[region].width * 3;
               std::memcpy(out[region].as<uint8_t>() + y * bytes, row, bytes);
             });
}

void pixel_values(const PixelValuesArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  auto job = std::make_shared<Job>(a.images, a.regions, a.filter, a.boxes, a.colors, a.line_width,
                                   cpu.threads());
  std::vector<int64_t> start;  // of each region, in elements
  int64_t elements = 0;
  for (const RegionPlan& r : job->plan.regions) {
    start.push_back(elements);
    elements += r.height * r.width * 3 * a.temporal;
  }
  auto queue = [&]<class T>(T*) {
    launch_job(
        cpu, job,
        [out = a.out.as<T>(), start = std::move(start),
         table = pixel_table(a.mean, a.std, a.out.dtype), patch = a.patch, temporal = a.temporal,
         merge = a.merge](const Job& job, int64_t region, int64_t y, const uint8_t* row) {
          patch_row(reinterpret_cast<const T*>(table.data()), row, out + start[region],
                    job.plan.regions[region].width / patch, patch, temporal, merge, y);
        });
  };
  if (a.out.dtype == DType::f32)
    queue(static_cast<uint32_t*>(nullptr));
  else
    queue(static_cast<uint16_t*>(nullptr));
}

}  // namespace p2r::cpu

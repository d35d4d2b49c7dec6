// GEMM: cache blocking and threads around the microkernel of cpu/simd/gemm.cpp (Goto and van de
// Geijn, 2008).
//
//   tall:     for each slab of columns of C, narrow enough for its B to be packed whole
//               all threads pack B's columns: they stay in L3
//               for each tile of C, by one thread:
//                 for each block of k: pack A's block (L2), C tile += A block * B block
//   short:    one row of tiles, so nothing of B is used twice: each thread packs its own
//   split-K:  C is small and k long, as for the gradient of a weight: k is cut into slices, each a
//             product of its own into a partial C; the partial Cs are added up in order
//
// How C is cut into tiles may depend on the number of threads: the sum of an entry does not depend
// on it. How k is cut depends on the shape alone.
#include "cpu/gemm.h"

#include <algorithm>
#include <cstring>

#include "ops/integer.h"

namespace p2r::cpu {

namespace {

constexpr int64_t kTileM = 96;   // whole panels for every register tile; A's block is 96 KiB
constexpr int64_t kTileN = 512;  // C's tile, 192 KiB, fits L2 beside A's block
constexpr int64_t kPackedBFloats = int64_t{2} << 20;      // 8 MiB, a part of L3
constexpr int64_t kTaskPackedBFloats = int64_t{1} << 20;  // gemm_in_task's
constexpr int64_t kSlabK = 4096;  // most k of a packed slab of B: at least 512 columns of it fit
constexpr int64_t kMaxSplitKEntries = 64 * 1024;  // of C
constexpr int64_t kSliceK = 512;
constexpr int64_t kMaxSlices = 64;
// Multiply-adds worth a task of their own, some 5 us; packing an entry costs about as much as 12.
constexpr int64_t kTaskWork = 512 * 1024, kPackingWork = 12;

// `size` rows or columns cut into parts of whole panels, as evenly as possible.
struct Split {
  int64_t size, panel, parts;
  int64_t begin(int64_t i) const {
    return std::min(size, ceil_div(size, panel) * i / parts * panel);
  }
  int64_t largest() const { return ceil_div(ceil_div(size, panel), parts) * panel; }
};

struct Tile {
  int64_t i, j, m, n;
};

bool pairs_of(const CpuDevice& cpu, const Gemm& g) { return uses_pairs(cpu, g.a.dtype, g.b.dtype); }
// The block of k of a product that is not part of another one.
int64_t block_k_of(const CpuDevice& cpu, const Gemm& g) { return sum_block(g.k, pairs_of(cpu, g)); }

// The columns first .. first + width of B, packed block of k by block of k.
struct PackedB {
  const float* data = nullptr;  // null: each tile packs its own part
  int64_t first = 0, width = 0;
};

// How C is cut into tiles, and the sizes of a thread's buffers for one.
struct Tiling {
  Split rows, columns;
  bool pairs;
  int64_t block_k, a_floats, b_floats, tile_floats;  // tile_floats: 0 where C is f32

  int64_t count() const { return rows.parts * columns.parts; }
  int64_t floats() const { return a_floats + b_floats + tile_floats; }
  // Words of the packed panels for this many steps of k.
  int64_t depth(int64_t k) const { return pairs ? (k + 1) / 2 : k; }
  Tile tile(int64_t t) const {
    const int64_t i = rows.begin(t / columns.parts), j = columns.begin(t % columns.parts);
    return {i, j, rows.begin(t / columns.parts + 1) - i, columns.begin(t % columns.parts + 1) - j};
  }
};

// Multiply-adds, and the packing in units of them.
int64_t work_of(const Gemm& g) { return g.m * g.n * g.k + kPackingWork * (g.m * g.k + g.k * g.n); }

// The chunk size of a loop over `items` with `work` in all: one chunk where sharing does not pay.
int64_t grain(int64_t items, int64_t work) { return work < 2 * kTaskWork ? items : 1; }

// k is summed in blocks of block_k. `copies` products of this shape run concurrently.
Tiling tiling(const Gemm& g, const CpuDevice& cpu, int64_t block_k, bool packs_b,
              int64_t copies = 1) {
  int mr, nr;
  cpu.simd().gemm_tile_size(&mr, &nr);
  const int64_t threads = cpu.threads();
  const int64_t wanted = std::clamp<int64_t>(copies * work_of(g) / kTaskWork, 1, 4 * threads);
  int64_t rows = ceil_div(g.m, kTileM), columns = ceil_div(g.n, kTileN);
  while (copies * rows * columns < wanted) {
    const bool tall = g.m / rows >= 2 * mr, wide = g.n / columns >= 2 * nr;
    if (tall && (!wide || g.m / rows > g.n / columns))
      rows *= 2;
    else if (wide)
      columns *= 2;
    else
      break;
  }
  // With few tiles, an incomplete last wave would cost much.
  if (wanted > 1 && copies == 1 && rows * columns < 16 * threads)
    rows = std::min(round_up(rows, threads), ceil_div(g.m, mr));
  Tiling t{{g.m, mr, rows}, {g.n, nr, columns}, pairs_of(cpu, g), block_k, 0, 0, 0};
  const auto aligned = [](int64_t floats) { return round_up(floats, 16); };  // to cache lines
  t.a_floats = aligned(t.rows.largest() * t.depth(t.block_k));
  t.b_floats = packs_b ? aligned(t.columns.largest() * t.depth(t.block_k)) : 0;
  t.tile_floats = g.c_dtype == DType::f32 ? 0 : aligned(t.rows.largest() * t.columns.largest());
  return t;
}

// Element i of C's memory.
char* element_of_c(const Gemm& g, int64_t i) {
  return static_cast<char*>(g.c) + i * static_cast<int64_t>(size_of(g.c_dtype));
}

// bias[j ...] as f32.
const float* bias_f32(const Simd& simd, const View& bias, int64_t j, int64_t n, float* buffer) {
  if (bias.dtype == DType::f32) return bias.as<const float>() + j;
  simd.to_f32(bias.dtype, bias.element(j), buffer, n);
  return buffer;
}

// Sets each row of a tile to the bias, or adds the bias to it.
void apply_bias(const Simd& simd, const View& bias, const Tile& t, float* c, int64_t stride,
                bool add) {
  constexpr int64_t kChunk = 1024;
  float buffer[kChunk];
  for (int64_t j = 0; j < t.n; j += kChunk) {
    const int64_t n = std::min(kChunk, t.n - j);
    const float* b = bias_f32(simd, bias, t.j + j, n, buffer);
    for (int64_t i = 0; i < t.m; ++i) {
      float* row = c + i * stride + j;
      if (add)
        for (int64_t l = 0; l < n; ++l) row[l] += b[l];
      else
        std::memcpy(row, b, n * 4);
    }
  }
}

void compute_tile(const Gemm& g, const Simd& simd, const Tiling& plan, const Tile& t,
                  const PackedB& b, float* scratch) {
  float* a_block = scratch;
  float* b_block = a_block + plan.a_floats;
  const bool direct = g.c_dtype == DType::f32;
  float* c =
      direct ? static_cast<float*>(g.c) + t.i * g.c_row_stride + t.j : b_block + plan.b_floats;
  const int64_t stride = direct ? g.c_row_stride : t.n;

  bool add = g.accumulate;
  if (g.bias) {
    apply_bias(simd, g.bias, t, c, stride, add);
    add = true;
  }
  if (g.k == 0 && !add)
    simd.gemm_panels(plan.pairs, t.m, t.n, 0, a_block, b_block, c, stride, false, nullptr);
  for (int64_t k0 = 0; k0 < g.k; k0 += plan.block_k, add = true) {
    const int64_t k = std::min(plan.block_k, g.k - k0);
    const Matrix x = g.a.from(t.i, k0);
    simd.pack_a(plan.pairs, x.dtype, x.data, x.row_stride, x.column_stride, t.m, k, a_block);
    const float* columns = b_block;
    if (b.data) {
      columns = b.data + plan.depth(k0) * b.width + (t.j - b.first) * plan.depth(k);
    } else {
      const Matrix y = g.b.from(k0, t.j);
      simd.pack_b(plan.pairs, y.dtype, y.data, y.row_stride, y.column_stride, k, t.n, b_block);
    }
    simd.gemm_panels(plan.pairs, t.m, t.n, k, a_block, columns, c, stride, add, nullptr);
  }
  if (!direct)
    for (int64_t i = 0; i < t.m; ++i)
      simd.from_f32(g.c_dtype, c + i * stride, element_of_c(g, (t.i + i) * g.c_row_stride + t.j),
                    t.n);
}

void short_gemm(CpuDevice& cpu, const Gemm& g) {
  const Tiling plan = tiling(g, cpu, block_k_of(cpu, g), true);
  const Scratch scratch = cpu.scratch(cpu.threads() * plan.floats() * 4);
  cpu.launch(plan.count(), grain(plan.count(), work_of(g)),
             [=, &simd = cpu.simd(), memory = scratch.as<float>()](int64_t begin, int64_t end,
                                                                   int thread) {
               for (int64_t t = begin; t < end; ++t)
                 compute_tile(g, simd, plan, plan.tile(t), {}, memory + thread * plan.floats());
             });
}

// Inside queued work: packs all of B into `packed`, then computes the tiles.
void tall_gemm_in_task(CpuDevice& cpu, const Gemm& g, const Tiling& plan, float* packed,
                       float* workspace) {
  const Simd& simd = cpu.simd();
  const int64_t nr = plan.columns.panel, width = round_up(g.n, nr);
  const int64_t group = 4 * nr, groups = ceil_div(g.n, group);
  const int64_t packs = groups * ceil_div(g.k, plan.block_k);
  cpu.parallel(packs, grain(packs, kPackingWork * g.k * g.n), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k0 = i / groups * plan.block_k, j = i % groups * group;
      const int64_t k = std::min(plan.block_k, g.k - k0);
      const Matrix b = g.b.from(k0, j);
      simd.pack_b(plan.pairs, b.dtype, b.data, b.row_stride, b.column_stride, k,
                  std::min(group, g.n - j), packed + plan.depth(k0) * width + j * plan.depth(k));
    }
  });
  cpu.parallel(plan.count(), grain(plan.count(), work_of(g)),
               [&](int64_t begin, int64_t end, int thread) {
                 for (int64_t t = begin; t < end; ++t)
                   compute_tile(g, simd, plan, plan.tile(t), {packed, 0, width},
                                workspace + thread * plan.floats());
               });
}

// One slab of k and of columns of C, of at most kSlabK and whole blocks of k but for the last.
void tall_gemm(CpuDevice& cpu, const Gemm& g, int64_t block_k) {
  const Tiling plan = tiling(g, cpu, block_k, false);
  const Scratch packed_b = cpu.scratch(round_up(g.n, plan.columns.panel) * plan.depth(g.k) * 4);
  const Scratch scratch = cpu.scratch(cpu.threads() * plan.floats() * 4);
  cpu.submit([=, &cpu, packed = packed_b.as<float>(), memory = scratch.as<float>()] {
    tall_gemm_in_task(cpu, g, plan, packed, memory);
  });
}

// k of the slabs that gemm_in_task packs of a B of this many columns.
int64_t task_slab_k(int64_t width) {
  return std::max(kTaskPackedBFloats / width / kBlockK, int64_t{1}) * kBlockK;
}

// C = the partial Cs, f32 and contiguous, added up in order (+ C) (+ bias).
void reduce_slices(CpuDevice& cpu, const Gemm& g, const float* partial, int64_t slices) {
  constexpr int64_t kChunk = 1024;
  const int64_t chunks = ceil_div(g.n, kChunk), items = g.m * chunks;
  const int64_t rows = std::max<int64_t>(1, 32 * 1024 / (std::min(g.n, kChunk) * slices));
  cpu.launch(items, rows, [=, &simd = cpu.simd()](int64_t begin, int64_t end, int) {
    float sum[kChunk], bias[kChunk];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item / chunks, j = item % chunks * kChunk;
      const int64_t n = std::min(kChunk, g.n - j);
      const float* from = partial + i * g.n + j;
      std::memcpy(sum, from, n * 4);
      for (int64_t s = 1; s < slices; ++s)
        for (int64_t l = 0; l < n; ++l) sum[l] += from[s * g.m * g.n + l];
      char* to = element_of_c(g, i * g.c_row_stride + j);
      if (g.bias) {
        const float* b = bias_f32(simd, g.bias, j, n, bias);
        for (int64_t l = 0; l < n; ++l) sum[l] += b[l];
      }
      if (g.accumulate) {
        const float* c = reinterpret_cast<const float*>(to);
        for (int64_t l = 0; l < n; ++l) sum[l] += c[l];
      }
      simd.from_f32(g.c_dtype, sum, to, n);
    }
  });
}

void split_k_gemm(CpuDevice& cpu, const Gemm& g, int64_t slices) {
  const Scratch partial = cpu.scratch(slices * g.m * g.n * 4);
  // All slices have this shape, and the same tiles.
  Gemm slice_gemm = g;
  slice_gemm.k = round_up(ceil_div(g.k, slices), 8);
  slice_gemm.c_dtype = DType::f32;
  slice_gemm.c_row_stride = g.n;
  slice_gemm.accumulate = false;
  slice_gemm.bias = {};
  const Tiling plan = tiling(slice_gemm, cpu, block_k_of(cpu, slice_gemm), true, slices);
  const Scratch scratch = cpu.scratch(cpu.threads() * plan.floats() * 4);
  const int64_t tasks = slices * plan.count();
  cpu.launch(tasks, grain(tasks, work_of(g)),
             [=, &simd = cpu.simd(), sums = partial.as<float>(), memory = scratch.as<float>()](
                 int64_t begin, int64_t end, int thread) {
               for (int64_t t = begin; t < end; ++t) {
                 const int64_t slice = t / plan.count(), k0 = slice * slice_gemm.k;
                 Gemm part = slice_gemm;
                 part.a = g.a.from(0, k0);
                 part.b = g.b.from(k0, 0);
                 part.k = std::clamp<int64_t>(g.k - k0, 0, slice_gemm.k);
                 part.c = sums + slice * g.m * g.n;
                 compute_tile(part, simd, plan, plan.tile(t % plan.count()), {},
                              memory + thread * plan.floats());
               }
             });
  reduce_slices(cpu, g, partial.as<float>(), slices);
}

}  // namespace

bool uses_pairs(const CpuDevice& cpu, DType a, DType b) {
  return cpu.features().bf16 && a == DType::bf16 && b == DType::bf16;
}

int64_t sum_block(int64_t k, bool pairs) {
  const int64_t largest = pairs ? 2 * kBlockK : kBlockK;
  const int64_t blocks = std::max<int64_t>(ceil_div(k, largest), 1);
  return round_up(std::max<int64_t>(ceil_div(k, blocks), 1), 8);  // 8 for k = 0
}

void gemm(CpuDevice& cpu, const Gemm& g) {
  if (g.m <= 0 || g.n <= 0) return;
  const int64_t slices = std::min(g.k / kSliceK, kMaxSlices);
  if (g.split_k && slices > 1 && g.m * g.n <= kMaxSplitKEntries)
    return split_k_gemm(cpu, g, slices);
  if (g.m <= kTileM) return short_gemm(cpu, g);
  if (g.k > kSlabK && g.c_dtype != DType::f32) {
    const Scratch sums = cpu.scratch(g.m * g.n * 4);
    Gemm exact = g;
    exact.c = sums.as<float>();
    exact.c_dtype = DType::f32;
    exact.c_row_stride = g.n;
    gemm(cpu, exact);
    Gemm rounded = g;
    rounded.bias = {};
    return reduce_slices(cpu, rounded, sums.as<float>(), 1);
  }
  // Slabs of k and of columns, so that the packed B stays small.
  const int64_t block_k = block_k_of(cpu, g), slab_k = kSlabK / block_k * block_k;
  for (int64_t k0 = 0; k0 == 0 || k0 < g.k; k0 += slab_k) {
    const int64_t k = std::min(slab_k, g.k - k0);
    const int64_t slabs = ceil_div(g.n * k, kPackedBFloats);
    int mr, nr;
    cpu.simd().gemm_tile_size(&mr, &nr);
    const Split columns{g.n, nr, std::max<int64_t>(1, std::min(slabs, ceil_div(g.n, nr)))};
    for (int64_t s = 0; s < columns.parts; ++s) {
      const int64_t j = columns.begin(s);
      Gemm slab = g;
      slab.n = columns.begin(s + 1) - j;
      slab.k = k;
      slab.a = g.a.from(0, k0);
      slab.b = g.b.from(k0, j);
      slab.c = element_of_c(g, j);
      if (k0) slab.accumulate = true;
      slab.bias = {};
      if (g.bias && k0 == 0) {
        slab.bias = g.bias;
        slab.bias.data = g.bias.element(j);
      }
      tall_gemm(cpu, slab, block_k);
    }
  }
}

void to_panel_words(const Simd& simd, bool pairs, DType type, const void* rows, int64_t stride,
                    int64_t n, int64_t k, float* to, int64_t ld) {
  const int64_t size = static_cast<int64_t>(size_of(type));
  for (int64_t r = 0; r < n; ++r, to += ld) {
    const char* row = static_cast<const char*>(rows) + r * stride * size;
    if (!pairs) {
      simd.to_f32(type, row, to, k);
      continue;
    }
    if (k % 2) to[k / 2] = 0;  // the last word's other half
    std::memcpy(to, row, k * size);
  }
}

int64_t prefetch_slots(const Simd& simd, int64_t m, int64_t n, int64_t k) {
  int mr, nr;
  simd.gemm_tile_size(&mr, &nr);
  return ceil_div(m, mr) * ceil_div(n, nr) * (k / 4);
}

void set_interval(Prefetch& prefetch, int64_t slots) {
  const int64_t lines = prefetch.rows * prefetch.lines;
  // An eighth less, because tiles of three vectors are fewer than prefetch_slots counts.
  if (lines > 0)
    prefetch.interval = prefetch.countdown = std::max<int64_t>((slots - slots / 8) / lines, 1);
}

void gemm_in_task(CpuDevice& cpu, const Gemm& g, float* workspace) {
  if (g.m <= 0 || g.n <= 0) return;
  int mr, nr;
  cpu.simd().gemm_tile_size(&mr, &nr);
  const int64_t width = round_up(g.n, nr), depth = task_slab_k(width);
  for (int64_t k0 = 0; k0 == 0 || k0 < g.k; k0 += depth) {
    Gemm slab = g;
    slab.k = std::min(depth, g.k - k0);
    slab.a = g.a.from(0, k0);
    slab.b = g.b.from(k0, 0);
    if (k0) {
      slab.accumulate = true;
      slab.bias = {};
    }
    tall_gemm_in_task(cpu, slab, tiling(slab, cpu, block_k_of(cpu, slab), false), workspace,
                      workspace + width * depth);
  }
}

int64_t gemm_workspace_floats(const CpuDevice& cpu, int64_t n) {
  int mr, nr;
  cpu.simd().gemm_tile_size(&mr, &nr);
  const int64_t width = round_up(std::max<int64_t>(n, 1), nr);
  return width * task_slab_k(width) + cpu.threads() * kTileM * kBlockK;
}

}  // namespace p2r::cpu

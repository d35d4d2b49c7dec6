// Blocking around the register tile of cpu/simd/gemm.cpp (Goto and van de Geijn, 2008):
//
//   tall:   for each slab of columns of C, narrow enough for its B to be packed whole
//             all threads pack B's columns: they stay in L3
//             for each tile of C, by one thread:
//               for each block of k: pack A's block (L2), C tile += A block * B block
//   short:  one row of tiles, so nothing of B is used twice: each thread packs its own
//   sliced: C is small and k long, as for the gradient of a weight: k is cut into slices, each a
//           product of its own into a partial C; the partial Cs are added up in order
//
// How C is cut into tiles may follow the number of threads: the sum of an entry does not depend on
// it. How k is cut depends on the shape alone.
#include "cpu/gemm.h"

#include <algorithm>
#include <cstring>

namespace p2r::cpu {

namespace {

constexpr int64_t kBlockK = 256;  // words: a panel of B, 32 KiB for 32 columns, fits L1
constexpr int64_t kTileM = 96;    // whole panels for every register tile; A's block is 96 KiB
constexpr int64_t kTileN = 512;   // C's tile, 192 KiB, lies in L2 beside A's block
constexpr int64_t kPackedB = int64_t{2} << 20;  // floats: 8 MiB, a share of L3
constexpr int64_t kSlabB = int64_t{1} << 20;    // floats: gemm_now's
constexpr int64_t kLongK = 4096;                // packed B's depth: at least 512 columns of it fit
constexpr int64_t kSlicedC = 64 * 1024;         // entries: at most this counts as small
constexpr int64_t kSliceK = 512;
constexpr int64_t kMostSlices = 64;
// Multiply-adds worth a task of their own, some 5 us; packing an entry costs about as much as 12.
constexpr int64_t kTaskWork = 512 * 1024, kPackingWork = 12;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// `size` rows or columns in parts of whole panels, as even as can be.
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

// Two bf16 share a word of the panels where the CPU multiplies such pairs.
bool in_pairs(const CpuDevice& cpu, const Gemm& g) {
  return cpu.features().bf16 && g.a.dtype == DType::bf16 && g.b.dtype == DType::bf16;
}

// The columns first .. first + width of B, packed: blocks of k one after the other.
struct PackedB {
  const float* data = nullptr;  // null: each tile packs its own
  int64_t first = 0, width = 0;
};

// C's tiles, and what a thread needs for one.
struct Tiling {
  Split rows, columns;
  bool pairs;
  int64_t block_k, a_floats, b_floats, tile_floats;

  int64_t count() const { return rows.parts * columns.parts; }
  int64_t floats() const { return a_floats + b_floats + tile_floats; }
  // Words of the packed panels for this many steps of k.
  int64_t depth(int64_t k) const { return pairs ? (k + 1) / 2 : k; }
  Tile tile(int64_t t) const {
    const int64_t i = rows.begin(t / columns.parts), j = columns.begin(t % columns.parts);
    return {i, j, rows.begin(t / columns.parts + 1) - i, columns.begin(t % columns.parts + 1) - j};
  }
};

int64_t work_of(const Gemm& g) { return g.m * g.n * g.k + kPackingWork * (g.m * g.k + g.k * g.n); }

// Chunks of a loop over `items` that is worth `work` in all.
int64_t grain(int64_t items, int64_t work) { return work < 2 * kTaskWork ? items : 1; }

// `copies` products of this shape run side by side.
Tiling tiling(const Gemm& g, const CpuDevice& cpu, bool packs_b, int64_t copies = 1) {
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
  // With few tiles, a last one for one thread alone would be felt.
  if (wanted > 1 && copies == 1 && rows * columns < 16 * threads)
    rows = std::min(round_up(rows, threads), ceil_div(g.m, mr));
  Tiling t{{g.m, mr, rows}, {g.n, nr, columns}, in_pairs(cpu, g), 0, 0, 0, 0};
  const int64_t most = t.pairs ? 2 * kBlockK : kBlockK;
  t.block_k = round_up(ceil_div(g.k, std::max<int64_t>(ceil_div(g.k, most), 1)), 8);
  const auto lines = [](int64_t floats) { return round_up(floats, 16); };
  t.a_floats = lines(t.rows.largest() * t.depth(t.block_k));
  t.b_floats = packs_b ? lines(t.columns.largest() * t.depth(t.block_k)) : 0;
  t.tile_floats = g.c_dtype == DType::f32 ? 0 : lines(t.rows.largest() * t.columns.largest());
  return t;
}

char* at(void* data, DType dtype, int64_t i) {
  return static_cast<char*>(data) + i * int64_t(size_of(dtype));
}

// bias[j ...] as f32.
const float* bias_of(const Simd& simd, const View& bias, int64_t j, int64_t n, float* buffer) {
  if (bias.dtype == DType::f32) return bias.as<const float>() + j;
  simd.to_f32(bias.dtype, at(bias.data, bias.dtype, j), buffer, n);
  return buffer;
}

// Row by row, row += bias or row = bias.
void start_with_bias(const Simd& simd, const View& bias, const Tile& t, float* c, int64_t stride,
                     bool add) {
  constexpr int64_t kChunk = 1024;
  float buffer[kChunk];
  for (int64_t j = 0; j < t.n; j += kChunk) {
    const int64_t n = std::min(kChunk, t.n - j);
    const float* b = bias_of(simd, bias, t.j + j, n, buffer);
    for (int64_t i = 0; i < t.m; ++i) {
      float* row = c + i * stride + j;
      if (add)
        for (int64_t l = 0; l < n; ++l) row[l] += b[l];
      else
        std::memcpy(row, b, n * 4);
    }
  }
}

void compute(const Gemm& g, const Simd& simd, const Tiling& plan, const Tile& t, const PackedB& b,
             float* scratch) {
  float* a_block = scratch;
  float* b_block = a_block + plan.a_floats;
  const bool direct = g.c_dtype == DType::f32;
  float* c =
      direct ? static_cast<float*>(g.c) + t.i * g.c_row_stride + t.j : b_block + plan.b_floats;
  const int64_t stride = direct ? g.c_row_stride : t.n;

  bool add = g.accumulate;
  if (g.bias) {
    start_with_bias(simd, g.bias, t, c, stride, add);
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
      simd.from_f32(g.c_dtype, c + i * stride, at(g.c, g.c_dtype, (t.i + i) * g.c_row_stride + t.j),
                    t.n);
}

void short_product(CpuDevice& cpu, const Gemm& g) {
  const Tiling plan = tiling(g, cpu, true);
  const Scratch scratch = cpu.scratch(cpu.threads() * plan.floats() * 4);
  cpu.launch(plan.count(), grain(plan.count(), work_of(g)),
             [=, &simd = cpu.simd(), memory = scratch.as<float>()](int64_t begin, int64_t end,
                                                                   int thread) {
               for (int64_t t = begin; t < end; ++t)
                 compute(g, simd, plan, plan.tile(t), {}, memory + thread * plan.floats());
             });
}

// Inside queued work: packs B whole into `columns`, then computes the tiles.
void compute_tall(CpuDevice& cpu, const Gemm& g, const Tiling& plan, float* columns,
                  float* memory) {
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
                  std::min(group, g.n - j), columns + plan.depth(k0) * width + j * plan.depth(k));
    }
  });
  cpu.parallel(plan.count(), grain(plan.count(), work_of(g)),
               [&](int64_t begin, int64_t end, int thread) {
                 for (int64_t t = begin; t < end; ++t)
                   compute(g, simd, plan, plan.tile(t), {columns, 0, width},
                           memory + thread * plan.floats());
               });
}

// One slab of columns: k is at most kLongK, or C has 16 bits.
void tall_product(CpuDevice& cpu, const Gemm& g) {
  const Tiling plan = tiling(g, cpu, false);
  const Scratch packed = cpu.scratch(round_up(g.n, plan.columns.panel) * plan.depth(g.k) * 4);
  const Scratch scratch = cpu.scratch(cpu.threads() * plan.floats() * 4);
  cpu.submit([=, &cpu, columns = packed.as<float>(), memory = scratch.as<float>()] {
    compute_tall(cpu, g, plan, columns, memory);
  });
}

// The depth of the slabs that gemm_now packs of a B of this many columns.
int64_t slab_depth(int64_t width) {
  return std::max(kSlabB / width / kBlockK, int64_t{1}) * kBlockK;
}

// C = the partial Cs, f32 and contiguous, added up in order (+ C) (+ bias).
void finish(CpuDevice& cpu, const Gemm& g, const float* partial, int64_t slices) {
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
      char* to = at(g.c, g.c_dtype, i * g.c_row_stride + j);
      if (g.bias) {
        const float* b = bias_of(simd, g.bias, j, n, bias);
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

void sliced_product(CpuDevice& cpu, const Gemm& g, int64_t slices) {
  const Scratch partial = cpu.scratch(slices * g.m * g.n * 4);
  // A slice is like the whole but for its depth; all of them are cut alike.
  Gemm one = g;
  one.k = round_up(ceil_div(g.k, slices), 8);
  one.c_dtype = DType::f32;
  one.c_row_stride = g.n;
  one.accumulate = false;
  one.bias = {};
  const Tiling plan = tiling(one, cpu, true, slices);
  const Scratch scratch = cpu.scratch(cpu.threads() * plan.floats() * 4);
  const int64_t tasks = slices * plan.count();
  cpu.launch(tasks, grain(tasks, work_of(g)),
             [=, &simd = cpu.simd(), sums = partial.as<float>(), memory = scratch.as<float>()](
                 int64_t begin, int64_t end, int thread) {
               for (int64_t t = begin; t < end; ++t) {
                 const int64_t slice = t / plan.count(), k0 = slice * one.k;
                 Gemm part = one;
                 part.a = g.a.from(0, k0);
                 part.b = g.b.from(k0, 0);
                 part.k = std::clamp<int64_t>(g.k - k0, 0, one.k);
                 part.c = sums + slice * g.m * g.n;
                 compute(part, simd, plan, plan.tile(t % plan.count()), {},
                         memory + thread * plan.floats());
               }
             });
  finish(cpu, g, partial.as<float>(), slices);
}

}  // namespace

void gemm(CpuDevice& cpu, const Gemm& g) {
  if (g.m <= 0 || g.n <= 0) return;
  const int64_t slices = std::min(g.k / kSliceK, kMostSlices);
  if (slices > 1 && g.m * g.n <= kSlicedC) return sliced_product(cpu, g, slices);
  if (g.m <= kTileM) return short_product(cpu, g);
  if (g.k > kLongK && g.c_dtype != DType::f32) {
    const Scratch sums = cpu.scratch(g.m * g.n * 4);
    Gemm exact = g;
    exact.c = sums.as<float>();
    exact.c_dtype = DType::f32;
    exact.c_row_stride = g.n;
    exact.bias = {};
    gemm(cpu, exact);
    return finish(cpu, g, sums.as<float>(), 1);
  }
  // Slabs of k and of columns, so that the packed B stays small.
  for (int64_t k0 = 0; k0 == 0 || k0 < g.k; k0 += kLongK) {
    const int64_t k = std::min(kLongK, g.k - k0);
    const int64_t slabs = ceil_div(g.n * k, kPackedB);
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
      slab.c = at(g.c, g.c_dtype, j);
      if (k0) slab.accumulate = true;
      slab.bias = {};
      if (g.bias && k0 == 0) {
        slab.bias = g.bias;
        slab.bias.data = at(g.bias.data, g.bias.dtype, j);
      }
      tall_product(cpu, slab);
    }
  }
}

void to_words(const Simd& simd, bool pairs, DType type, const void* rows, int64_t stride, int64_t n,
              int64_t k, float* to, int64_t ld) {
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

int64_t chances_of(const Simd& simd, int64_t m, int64_t n, int64_t k) {
  int mr, nr;
  simd.gemm_tile_size(&mr, &nr);
  return ceil_div(m, mr) * ceil_div(n, nr) * (k / 4);
}

void spread(Ahead& ahead, int64_t chances) {
  const int64_t lines = ahead.rows * ahead.lines;
  // An eighth is for tiles wider than they are counted, of which there are fewer.
  if (lines > 0) ahead.pace = ahead.wait = std::max<int64_t>((chances - chances / 8) / lines, 1);
}

void gemm_now(CpuDevice& cpu, const Gemm& g, float* memory) {
  if (g.m <= 0 || g.n <= 0) return;
  int mr, nr;
  cpu.simd().gemm_tile_size(&mr, &nr);
  const int64_t width = round_up(g.n, nr), depth = slab_depth(width);
  for (int64_t k0 = 0; k0 == 0 || k0 < g.k; k0 += depth) {
    Gemm slab = g;
    slab.k = std::min(depth, g.k - k0);
    slab.a = g.a.from(0, k0);
    slab.b = g.b.from(k0, 0);
    if (k0) {
      slab.accumulate = true;
      slab.bias = {};
    }
    compute_tall(cpu, slab, tiling(slab, cpu, false), memory, memory + width * depth);
  }
}

int64_t gemm_floats(const CpuDevice& cpu, int64_t n) {
  int mr, nr;
  cpu.simd().gemm_tile_size(&mr, &nr);
  const int64_t width = round_up(std::max<int64_t>(n, 1), nr);
  return width * slab_depth(width) + cpu.threads() * kTileM * kBlockK;
}

}  // namespace p2r::cpu

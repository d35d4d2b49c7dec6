// The GEMM microkernel: packing into panels, and the register tile (the innermost loops of Goto and
// van de Geijn, 2008; the blocking around them is cpu/gemm.cpp).
//
//   for each panel of B           NR columns, k x NR floats: stays in L1
//     for each panel of A         MR rows, streams from L2
//       acc[MR][NR / W] = 0       in registers
//       for each k                NR / W loads of B, MR broadcasts of A, MR * NR / W FMAs
//       C (=, +=) acc             epilogue
//
// The tile's accumulators fill most of the register file, so that each load is used often and the
// latency of an FMA is hidden: 24 of 32 registers on AVX-512, 12 of 16 on AVX2 and SSE2.
//
// Panels of pairs hold words of two bf16, of k and k + 1, instead of floats: half the steps, and
// twice the throughput where the CPU has AVX512-BF16 (vdpbf16ps: exact products, each added to an
// f32).
#include "cpu/simd/simd.h"
#include "cpu/simd/words.h"

namespace p2r::cpu::P2R_ISA {

namespace {

#if defined(__AVX512F__)
constexpr int MR = 12;
#elif defined(__aarch64__)
constexpr int MR = 8;
#else
constexpr int MR = 6;
#endif
constexpr int NV = 2, NR = NV * W;
constexpr int64_t kMinPrefetchedDepth = 128;  // words: sums long enough to prefetch C's tile

// Packing. A lane of a panel of width P is a row of A or a column of B.

// A panel's lanes are handled as groups of at most W: the lanes of group g.
template <int P>
constexpr int group_width(int g) {
  return P - g * W < W ? P - g * W : W;
}
template <int P>
constexpr int kGroups = (P + W - 1) / W;

// The first `valid` contiguous lanes at step i of k, or at steps 2 i and 2 i + 1 as pairs.
template <class Type, bool kPairs>
inline vf load_step(const typename Type::Element* x, int64_t k_stride, int64_t i, int64_t k,
                    int valid) {
  typedef typename Type::Vector Vector;
  // Full vectors are a case of their own: load_first may loop over bytes.
  const auto lanes = [&](const typename Type::Element* p) {
    return valid == W ? load<Vector>(p) : load_first<Vector>(p, valid);
  };
  if constexpr (kPairs) {
    const typename Type::Element* low = x + 2 * i * k_stride;
    return to_pairs(lanes(low), 2 * i + 1 < k ? lanes(low + k_stride) : Vector{});
  } else {
    return Type::to_f32(lanes(x + i * k_stride));
  }
}

// Lanes are contiguous (lane_stride is 1): one short copy for each step of k. Eight steps at a
// time, so that reads follow the rows and writes fill whole cache lines.
template <class Type, int P, bool kPairs>
void pack_lane_major(const typename Type::Element* x, int64_t k_stride, int64_t lanes, int64_t k,
                     float* out) {
  const int64_t depth = kPairs ? (k + 1) / 2 : k;
  for (int64_t i0 = 0; i0 < depth; i0 += 8)
    for (int64_t lane = 0; lane < lanes; lane += P) {
      const int64_t end = min(depth, i0 + 8);
      const int count = static_cast<int>(min(P, lanes - lane));
      const bool full = count == P;
      for (int64_t i = i0; i < end; ++i) {
        float* to = out + lane * depth + i * P;
#pragma GCC unroll 4
        for (int g = 0; g < kGroups<P>; ++g) {
          const int width = group_width<P>(g);
          const int left = count - g * W;
          const int valid = left < 0 ? 0 : left < width ? left : width;
          const typename Type::Element* from = x + lane + g * W;
          const vf v = full ? load_step<Type, kPairs>(from, k_stride, i, k, width)
                            : load_step<Type, kPairs>(from, k_stride, i, k, valid);
          if (width == W)
            store(to + g * W, v);
          else
            store_first(to + g * W, v, width);
        }
      }
    }
}

// Each lane is contiguous along k (k_stride is 1): W x W blocks are transposed in registers.
template <class Type, int P, bool kPairs>
void pack_k_major(const typename Type::Element* x, int64_t lane_stride, int64_t lanes, int64_t k,
                  float* out) {
  typedef typename Type::Vector Vector;
  const int64_t depth = kPairs ? (k + 1) / 2 : k;
  for (int64_t lane = 0; lane < lanes; lane += P)
#pragma GCC unroll 4
    for (int g = 0; g < kGroups<P>; ++g) {
      const int width = group_width<P>(g);
      const int64_t left = lanes - lane - g * W;
      const int valid = static_cast<int>(left < 0 ? 0 : min(left, width));
      const typename Type::Element* from = x + (lane + g * W) * lane_stride;
      float* to = out + lane * depth + g * W;
      for (int64_t i = 0; i < depth; i += W) {
        const int steps = static_cast<int>(min(W, depth - i));
        const typename Type::Element* row = from + (kPairs ? 2 * i : i);
        // Keeps the compiler from computing the addresses of all rows before the loop, and spilling
        // them.
        asm("" : "+r"(row));
        const auto load_words = [&]() __attribute__((always_inline)) {
          if constexpr (kPairs)
            return load_pairs(row, k - 2 * i);
          else
            return Type::to_f32(steps == W ? load<Vector>(row) : load_first<Vector>(row, steps));
        };
        vf block[W];
        if (valid == W) {
#pragma GCC unroll 16
          for (int r = 0; r < W; ++r, row += lane_stride) block[r] = load_words();
        } else {
          for (int r = 0; r < W; ++r, row += lane_stride)
            block[r] = r < valid ? load_words() : vf{};
        }
        transpose(block);
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j)
          if (j < steps) {
            if (width == W)
              store(to + (i + j) * P, block[j]);
            else
              store_first(to + (i + j) * P, block[j], width);
          }
      }
    }
}

template <class Type, int P, bool kPairs>
void pack_strided(const typename Type::Element* x, int64_t lane_stride, int64_t k_stride,
                  int64_t lanes, int64_t k, float* out) {
  typedef typename Type::Element Element;
  const int64_t depth = kPairs ? (k + 1) / 2 : k, steps = kPairs ? 2 : 1;
  for (int64_t lane = 0; lane < lanes; lane += P)
    for (int64_t i = 0; i < depth; ++i)
      for (int g = 0; g < kGroups<P>; ++g) {
        const int64_t first = lane + g * W;
        const int width = group_width<P>(g);
        Element element[2 * W] = {};  // the lanes of a step of k, and of the next
        for (int64_t s = 0; s < steps && steps * i + s < k; ++s)
          for (int l = 0; l < width && first + l < lanes; ++l)
            element[s * W + l] = x[(first + l) * lane_stride + (steps * i + s) * k_stride];
        store_first(out + lane * depth + i * P + g * W,
                    load_step<Type, kPairs>(element, W, 0, steps, W), width);
      }
}

template <class Type, int P, bool kPairs>
void pack_as(const void* x, int64_t lane_stride, int64_t k_stride, int64_t lanes, int64_t k,
             float* out) {
  const typename Type::Element* e = static_cast<const typename Type::Element*>(x);
  if (lane_stride == 1)
    pack_lane_major<Type, P, kPairs>(e, k_stride, lanes, k, out);
  else if (k_stride == 1)
    pack_k_major<Type, P, kPairs>(e, lane_stride, lanes, k, out);
  else
    pack_strided<Type, P, kPairs>(e, lane_stride, k_stride, lanes, k, out);
}

template <int P>
void pack(bool pairs, DType type, const void* x, int64_t lane_stride, int64_t k_stride,
          int64_t lanes, int64_t k, float* out) {
  if (type == DType::f16)
    pack_as<F16, P, false>(x, lane_stride, k_stride, lanes, k, out);
  else if (type == DType::f32)
    (pairs ? pack_as<F32, P, true> : pack_as<F32, P, false>)(x, lane_stride, k_stride, lanes, k,
                                                             out);
  else
    (pairs ? pack_as<Bf16, P, true> : pack_as<Bf16, P, false>)(x, lane_stride, k_stride, lanes, k,
                                                               out);
}

// One prefetch slot: every `interval` slots, prefetches the next line of each tensor into L2.
inline void prefetch_line(Prefetch& p) {
  if (--p.countdown) return;
  p.countdown = p.interval;
  if (!p.rows) return;
  __builtin_prefetch(p.line, 0, 2);
  if (p.second) __builtin_prefetch(p.line + p.second, 0, 2);
  if (p.third) __builtin_prefetch(p.line + p.third, 0, 2);
  p.line += 64;
  if (p.output) {
    __builtin_prefetch(p.output, 0, 2);
    p.output += 64;
  }
  if (--p.lines_left) return;
  p.lines_left = p.lines;
  p.line += p.skip;
  p.output += p.output_skip;
  --p.rows;
}

// A vector of sums in the output's type.
inline vf convert_for(float*, vf x) { return x; }
inline vh convert_for(uint16_t*, vf x) { return to_bf16_native(x); }

// How A is stored: packed, with the words of a step of k contiguous and lda from step to step, or
// row-major, with the words of a row contiguous and lda from row to row.
enum class Layout { packed, row_major };

// What follows the k loop: (accumulators + C) * row_scale, stored to C or to `out`; see RowGemm.
struct Epilogue {
  bool accumulate = false;
  const float* row_scale = nullptr;
  void* out = nullptr;
  int64_t ld_out = 0;
  bool nontemporal = false;
};

// One register tile: R rows and V vectors of columns, the last of which has `last` columns. B has
// ldb words from one step of k to the next.
template <class Words, Layout kLayout, int R, int V>
void tile(int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
          int64_t ldc, int last, const Epilogue& epilogue, Prefetch* prefetch) {
  typedef typename Words::Out Out;
  Out* out = static_cast<Out*>(epilogue.out);
  const auto for_each_vector = [&](auto* to, int64_t ld, auto f) __attribute__((always_inline)) {
    // Keeps the address computation inside each pass: computed once for all the passes that may
    // follow, the addresses of all rows would take 60 cycles and more registers than there are.
    asm("" : "+r"(to));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r, to += ld)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) f(r, v, to + v * W);
  };
  // The destination's lines are fetched during the k loop; stores that miss the cache would stall.
  // After a short sum they are mostly in the cache already.
  const auto prefetch_vector = [](int, int, void* to) { __builtin_prefetch(to, 1); };
  const bool ahead = k >= kMinPrefetchedDepth && !epilogue.nontemporal;
  if (epilogue.accumulate || (ahead && !out)) for_each_vector(c, ldc, prefetch_vector);
  if (ahead && out) for_each_vector(out, epilogue.ld_out, prefetch_vector);
  vf acc[R][V] = {};
  const auto step = [&]() __attribute__((always_inline)) {
    vf row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = loadf(b + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf x = set1(a[kLayout == Layout::row_major ? r * lda : r]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = Words::multiply_add(acc[r][v], x, row[v]);
    }
    a += kLayout == Layout::row_major ? 1 : lda;
    b += ldb;
  };
  int64_t i = 0;
  for (; i + 4 <= k; i += 4) {
    if (prefetch) prefetch_line(*prefetch);
    step();
    step();
    step();
    step();
  }
  for (; i < k; ++i) step();
  const auto full = [&](int v) { return v < V - 1 || last == W; };
  // Branches are around these passes, not inside them, so that the accumulators stay in registers.
  if (epilogue.accumulate)
    for_each_vector(c, ldc, [&](int r, int v, float* from) {
      acc[r][v] += full(v) ? loadf(from) : load_first<vf>(from, last);
    });
  if (epilogue.row_scale)
    for_each_vector(c, 0, [&](int r, int v, float*) { acc[r][v] *= epilogue.row_scale[r]; });
  const auto store_tile = [&](auto* first, int64_t ld) __attribute__((always_inline)) {
    if (last == W)
      for_each_vector(first, ld,
                      [&](int r, int v, auto* to) { store(to, convert_for(to, acc[r][v])); });
    else
      for_each_vector(first, ld, [&](int r, int v, auto* to) {
        if (v < V - 1)
          store(to, convert_for(to, acc[r][v]));
        else
          store_first(to, convert_for(to, acc[r][v]), last);
      });
  };
  if (epilogue.nontemporal)
    for_each_vector(out, epilogue.ld_out, [&](int r, int v, auto* to) {
      store_nontemporal(to, convert_for(to, acc[r][v]));
    });
  else if (out)
    store_tile(out, epilogue.ld_out);
  else
    store_tile(c, ldc);
}

// The tile of `rows` rows, R at most.
template <class Words, Layout kLayout, int V, int R = MR>
inline void dispatch_tile(int rows, int64_t k, const float* a, int64_t lda, const float* b,
                          int64_t ldb, float* c, int64_t ldc, int last, const Epilogue& epilogue,
                          Prefetch* prefetch) {
  if (rows == R)
    tile<Words, kLayout, R, V>(k, a, lda, b, ldb, c, ldc, last, epilogue, prefetch);
  else if constexpr (R > 1)
    dispatch_tile<Words, kLayout, V, R - 1>(rows, k, a, lda, b, ldb, c, ldc, last, epilogue,
                                            prefetch);
}

template <class Words>
void multiply_panels(int64_t m, int64_t n, int64_t depth, const float* a, const float* b, float* c,
                     int64_t ldc, bool accumulate, Prefetch* prefetch) {
  const Epilogue epilogue{.accumulate = accumulate};
  for (int64_t j = 0; j < n; j += NR) {
    const int columns = static_cast<int>(min(NR, n - j));
    for (int64_t i = 0; i < m; i += MR) {
      const int rows = static_cast<int>(min(MR, m - i));
      const float *x = a + i * depth, *y = b + j * depth;
      float* to = c + i * ldc + j;
      if (columns > W)
        dispatch_tile<Words, Layout::packed, 2>(rows, depth, x, MR, y, NR, to, ldc, columns - W,
                                                epilogue, prefetch);
      else
        dispatch_tile<Words, Layout::packed, 1>(rows, depth, x, MR, y, NR, to, ldc, columns,
                                                epilogue, prefetch);
    }
  }
}

// V vectors of columns from j on, in tiles of nearly equal height: one of a few rows would not hide
// the latency of its FMAs.
template <class Words, Layout kLayout, int V, int R = MR>
void multiply_strip(const RowGemm& g, int64_t depth, const float* b, int64_t j) {
  const int64_t tiles = (g.m + R - 1) / R;
  const int last = static_cast<int>(min(W, g.n - j - (V - 1) * W));
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t i = g.m * t / tiles, end = g.m * (t + 1) / tiles;
    Epilogue epilogue{g.accumulate, g.row_scale ? g.row_scale + i : nullptr, g.out, g.ld_out,
                      g.nontemporal};
    if (g.out) epilogue.out = static_cast<typename Words::Out*>(g.out) + i * g.ld_out + j;
    dispatch_tile<Words, kLayout, V, R>(
        static_cast<int>(end - i), depth, g.a + (kLayout == Layout::row_major ? i * g.lda : i),
        g.lda, b, g.ldb, g.c + i * g.ldc + j, g.ldc, last, epilogue, g.prefetch);
  }
}

// B is in panels where ldb is NR: a row-major B with that ldb has one panel, which is the same.
template <class Words, Layout kLayout>
void multiply_rows(const RowGemm& g, int64_t depth) {
  const bool panels = g.ldb == NR;
  for (int64_t j = 0; j < g.n; j += NR) {
    const float* b = g.b + (panels ? j * depth : j);
    const int64_t left = g.n - j;
    if constexpr (W == 16)
      // The last three vectors are one tile of fewer rows: in a tile of one vector, loads would be
      // as many as FMAs.
      if (!panels && left > 2 * W && left <= 3 * W)
        return multiply_strip<Words, kLayout, 3, 9>(g, depth, b, j);
    if (left > W)
      multiply_strip<Words, kLayout, 2>(g, depth, b, j);
    else
      multiply_strip<Words, kLayout, 1>(g, depth, b, j);
  }
}

}  // namespace

void gemm_tile_size(int* mr, int* nr) {
  *mr = MR;
  *nr = NR;
}

void pack_a(bool pairs, DType type, const void* x, int64_t row_stride, int64_t k_stride, int64_t m,
            int64_t k, float* out) {
  pack<MR>(pairs, type, x, row_stride, k_stride, m, k, out);
}

void pack_b(bool pairs, DType type, const void* x, int64_t k_stride, int64_t column_stride,
            int64_t k, int64_t n, float* out) {
  pack<NR>(pairs, type, x, column_stride, k_stride, n, k, out);
}

void pair_rows(int64_t rows, int64_t n, const uint16_t* x, int64_t stride, float* out, int64_t ld) {
  const int left = static_cast<int>(n % W);
  for (int64_t t = 0; 2 * t < rows; ++t) {
    float* to = out + t * ld;
    int64_t i = 0;
    for (; i + W <= n; i += W) store(to + i, load_step<Bf16, true>(x + i, stride, t, rows, W));
    if (left) store_first(to + i, load_step<Bf16, true>(x + i, stride, t, rows, left), left);
  }
}

void transpose(int64_t m, int64_t n, const float* x, int64_t ldx, float* y, int64_t ldy) {
  for (int64_t i = 0; i < m; i += W)
    for (int64_t j = 0; j < n; j += W) {
      const int rows = static_cast<int>(min(W, m - i)), columns = static_cast<int>(min(W, n - j));
      vf block[W];
      if (rows == W && columns == W) {
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) block[r] = loadf(x + (i + r) * ldx + j);
        transpose(block);
#pragma GCC unroll 16
        for (int c = 0; c < W; ++c) store(y + (j + c) * ldy + i, block[c]);
        continue;
      }
      for (int r = 0; r < W; ++r)
        block[r] = r < rows ? load_first<vf>(x + (i + r) * ldx + j, columns) : vf{};
      transpose(block);
      for (int c = 0; c < columns; ++c) store_first(y + (j + c) * ldy + i, block[c], rows);
    }
}

void gemm_panels(bool pairs, int64_t m, int64_t n, int64_t k, const float* a, const float* b,
                 float* c, int64_t ldc, bool accumulate, Prefetch* prefetch) {
  if (pairs)
    multiply_panels<PairWords>(m, n, (k + 1) / 2, a, b, c, ldc, accumulate, prefetch);
  else
    multiply_panels<F32Words>(m, n, k, a, b, c, ldc, accumulate, prefetch);
}

void gemm_rows(bool pairs, const RowGemm& g) {
  if (pairs)
    (g.a_transposed ? multiply_rows<PairWords, Layout::packed>
                    : multiply_rows<PairWords, Layout::row_major>)(g, (g.k + 1) / 2);
  else
    (g.a_transposed ? multiply_rows<F32Words, Layout::packed>
                    : multiply_rows<F32Words, Layout::row_major>)(g, g.k);
}

}  // namespace p2r::cpu::P2R_ISA

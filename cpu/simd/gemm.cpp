// The matrix product's innermost layer: packing, and the register tile.
//
//   for each panel of B           NR columns, k x NR floats: stays in L1
//     for each panel of A         MR rows, streams from L2
//       acc[MR][NR / W] = 0       in registers
//       for each k                NR / W loads of B, MR broadcasts of A, MR * NR / W fused products
//       C (=, +=) acc
//
// The tile's accumulators fill most of the register file, so that each load is used often and the
// latency of a fused product is hidden: 24 of 32 registers on AVX-512, 12 of 16 on AVX2 and SSE2.
//
// Panels of pairs are the same with a word of two bf16, of k and k + 1, where a float was: half the
// steps, and twice the products a second where the CPU has AVX512-BF16 (vdpbf16ps: exact products,
// each added to an f32).
#include "cpu/simd/simd.h"
#include "cpu/simd/vec.h"

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
constexpr int64_t kLongSum = 128;  // words

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct F32 {
  typedef float Element;
  typedef vf Vector;
  static vf widen(vf x) { return x; }
  static vf pairs(vf low, vf high) { return bf16_pairs(low, high); }
  // The first n of 2 W elements that lie side by side, as W pairs.
  static vf neighbours(const float* x, int64_t n) {
    const int more = n < W ? 0 : static_cast<int>(least(n - W, W));
    return bf16_neighbours(load_first<vf>(x, static_cast<int>(least(n, W))),
                           load_first<vf>(x + (more ? W : 0), more));
  }
};
struct F16 {
  typedef uint16_t Element;
  typedef vh Vector;
  static vf widen(vh x) { return from_f16(x); }
};
struct Bf16 {
  typedef uint16_t Element;
  typedef vh Vector;
  static vf widen(vh x) { return from_bf16(x); }
  static vf pairs(vh low, vh high) { return from_bits(widened(low) | widened(high) << 16); }
  static vf neighbours(const uint16_t* x, int64_t n) {
    return n < 2 * W ? load_first<vf>(x, static_cast<int>(n)) : load<vf>(x);
  }
};

// A W x W block in place: for each distance d, the blocks of d x d beside the diagonal change
// places (Eklundh, 1972).
template <int D>
inline void swap_blocks(vf* row) {
  vi from_right, from_left;
  for (int j = 0; j < W; ++j) {
    from_left[j] = j & D ? W + j - D : j;
    from_right[j] = j & D ? W + j : j + D;
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & D)) {
      const vf a = row[i], b = row[i + D];
      row[i] = __builtin_shuffle(a, b, from_left);
      row[i + D] = __builtin_shuffle(a, b, from_right);
    }
}
inline void transpose(vf* row) {
  if constexpr (W == 16) swap_blocks<8>(row);
  if constexpr (W >= 8) swap_blocks<4>(row);
  swap_blocks<2>(row);
  swap_blocks<1>(row);
}

// Lanes g * W and on of a panel that is P lanes wide: how many there are.
template <int P>
constexpr int lanes_of(int g) {
  return P - g * W < W ? P - g * W : W;
}
template <int P>
constexpr int kGroups = (P + W - 1) / W;

// The lanes of step i of k, or of steps 2 i and 2 i + 1 as pairs.
template <class Type, bool kPairs>
inline vf step_of(const typename Type::Element* x, int64_t k_stride, int64_t i, int64_t k,
                  int valid) {
  typedef typename Type::Vector Vector;
  // Spelt out for whole vectors, which need no loops over bytes.
  const auto lanes = [&](const typename Type::Element* p) {
    return valid == W ? load<Vector>(p) : load_first<Vector>(p, valid);
  };
  if constexpr (kPairs) {
    const typename Type::Element* low = x + 2 * i * k_stride;
    return Type::pairs(lanes(low), 2 * i + 1 < k ? lanes(low + k_stride) : Vector{});
  } else {
    return Type::widen(lanes(x + i * k_stride));
  }
}

// Lanes lie side by side: one short copy for each step. Eight steps at a time, so that reads follow
// the rows and writes fill whole cache lines.
template <class Type, int P, bool kPairs>
void pack_lanes(const typename Type::Element* x, int64_t k_stride, int64_t lanes, int64_t k,
                float* out) {
  const int64_t depth = kPairs ? (k + 1) / 2 : k;
  for (int64_t i0 = 0; i0 < depth; i0 += 8)
    for (int64_t lane = 0; lane < lanes; lane += P) {
      const int64_t end = least(depth, i0 + 8);
      const int here = static_cast<int>(least(P, lanes - lane));
      const bool whole = here == P;
      for (int64_t i = i0; i < end; ++i) {
        float* to = out + lane * depth + i * P;
#pragma GCC unroll 4
        for (int g = 0; g < kGroups<P>; ++g) {
          const int width = lanes_of<P>(g);
          const int left = here - g * W;
          const int valid = left < 0 ? 0 : left < width ? left : width;
          const typename Type::Element* from = x + lane + g * W;
          const vf v = whole ? step_of<Type, kPairs>(from, k_stride, i, k, width)
                             : step_of<Type, kPairs>(from, k_stride, i, k, valid);
          if (width == W)
            store(to + g * W, v);
          else
            store_first(to + g * W, v, width);
        }
      }
    }
}

// Each lane is a row along k: W x W blocks are transposed in registers.
template <class Type, int P, bool kPairs>
void pack_rows(const typename Type::Element* x, int64_t lane_stride, int64_t lanes, int64_t k,
               float* out) {
  typedef typename Type::Vector Vector;
  const int64_t depth = kPairs ? (k + 1) / 2 : k;
  for (int64_t lane = 0; lane < lanes; lane += P)
#pragma GCC unroll 4
    for (int g = 0; g < kGroups<P>; ++g) {
      const int width = lanes_of<P>(g);
      const int64_t left = lanes - lane - g * W;
      const int valid = static_cast<int>(left < 0 ? 0 : least(left, width));
      const typename Type::Element* from = x + (lane + g * W) * lane_stride;
      float* to = out + lane * depth + g * W;
      for (int64_t i = 0; i < depth; i += W) {
        const int steps = static_cast<int>(least(W, depth - i));
        const typename Type::Element* row = from + (kPairs ? 2 * i : i);
        // Or the addresses of all rows would be made before the loop, and spilled.
        asm("" : "+r"(row));
        const auto words = [&]() __attribute__((always_inline)) {
          if constexpr (kPairs)
            return Type::neighbours(row, k - 2 * i);
          else
            return Type::widen(steps == W ? load<Vector>(row) : load_first<Vector>(row, steps));
        };
        vf block[W];
        if (valid == W) {
#pragma GCC unroll 16
          for (int r = 0; r < W; ++r, row += lane_stride) block[r] = words();
        } else {
          for (int r = 0; r < W; ++r, row += lane_stride) block[r] = r < valid ? words() : vf{};
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
void pack_any(const typename Type::Element* x, int64_t lane_stride, int64_t k_stride, int64_t lanes,
              int64_t k, float* out) {
  typedef typename Type::Element Element;
  const int64_t depth = kPairs ? (k + 1) / 2 : k, steps = kPairs ? 2 : 1;
  for (int64_t lane = 0; lane < lanes; lane += P)
    for (int64_t i = 0; i < depth; ++i)
      for (int g = 0; g < kGroups<P>; ++g) {
        const int64_t first = lane + g * W;
        const int width = lanes_of<P>(g);
        Element element[2 * W] = {};  // the lanes of one step, and of the next
        for (int64_t s = 0; s < steps && steps * i + s < k; ++s)
          for (int l = 0; l < width && first + l < lanes; ++l)
            element[s * W + l] = x[(first + l) * lane_stride + (steps * i + s) * k_stride];
        store_first(out + lane * depth + i * P + g * W,
                    step_of<Type, kPairs>(element, W, 0, steps, W), width);
      }
}

template <class Type, int P, bool kPairs>
void pack_type(const void* x, int64_t lane_stride, int64_t k_stride, int64_t lanes, int64_t k,
               float* out) {
  const typename Type::Element* e = static_cast<const typename Type::Element*>(x);
  if (lane_stride == 1)
    pack_lanes<Type, P, kPairs>(e, k_stride, lanes, k, out);
  else if (k_stride == 1)
    pack_rows<Type, P, kPairs>(e, lane_stride, lanes, k, out);
  else
    pack_any<Type, P, kPairs>(e, lane_stride, k_stride, lanes, k, out);
}

template <int P>
void pack(bool pairs, DType type, const void* x, int64_t lane_stride, int64_t k_stride,
          int64_t lanes, int64_t k, float* out) {
  if (type == DType::f16)
    pack_type<F16, P, false>(x, lane_stride, k_stride, lanes, k, out);
  else if (type == DType::f32)
    (pairs ? pack_type<F32, P, true> : pack_type<F32, P, false>)(x, lane_stride, k_stride, lanes, k,
                                                                 out);
  else
    (pairs ? pack_type<Bf16, P, true> : pack_type<Bf16, P, false>)(x, lane_stride, k_stride, lanes,
                                                                   k, out);
}

struct Floats {
  typedef float Element;
  static vf add_product(vf sum, vf x, vf y) { return sum + x * y; }
};
struct Pairs {
  typedef uint16_t Element;
  static vf add_product(vf sum, vf x, vf y) { return bf16_dot(sum, x, y); }
};

// Asks for one line of each tensor, into L2, if it is time.
inline void ask(Ahead& a) {
  if (--a.wait) return;
  a.wait = a.pace;
  if (!a.rows) return;
  __builtin_prefetch(a.line, 0, 2);
  if (a.second) __builtin_prefetch(a.line + a.second, 0, 2);
  if (a.third) __builtin_prefetch(a.line + a.third, 0, 2);
  a.line += 64;
  if (a.result) {
    __builtin_prefetch(a.result, 0, 2);
    a.result += 64;
  }
  if (--a.left) return;
  a.left = a.lines;
  a.line += a.skip;
  a.result += a.result_skip;
  --a.rows;
}

// A vector of sums in the type of where it goes.
inline vf rounded_to(float*, vf x) { return x; }
inline vh rounded_to(uint16_t*, vf x) { return bf16_rounded(x); }

// How A lies: the words of a step of k side by side, as in packed panels, or those of a row.
enum class Lie { steps, rows };

// What becomes of a tile's sums.
struct Finish {
  bool accumulate = false;
  const float* factor = nullptr;
  void* out = nullptr;
  int64_t ld_out = 0;
  bool past_caches = false;
};

// R rows and V vectors of columns of one tile, the last of which has `last` columns. The steps of B
// lie ldb apart.
template <class Step, Lie kLie, int R, int V>
void tile(int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
          int64_t ldc, int last, const Finish& finish, Ahead* ahead) {
  typedef typename Step::Element Element;
  Element* out = static_cast<Element*>(finish.out);
  const auto each = [&](auto* to, int64_t ld, auto f) __attribute__((always_inline)) {
    // Each pass walks down by itself: the addresses of all rows, made once for every pass that
    // might need them, would take 60 cycles and more registers than there are.
    asm("" : "+r"(to));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r, to += ld)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) f(r, v, to + v * W);
  };
  // The lines that the sums go to come while they are made; asked for, as stores alone would wait
  // for them. A short sum's are mostly in the cache.
  const auto ask_for = [](int, int, void* to) { __builtin_prefetch(to, 1); };
  const bool late = k >= kLongSum && !finish.past_caches;
  if (finish.accumulate || (late && !out)) each(c, ldc, ask_for);
  if (late && out) each(out, finish.ld_out, ask_for);
  vf acc[R][V] = {};
  const auto step = [&]() __attribute__((always_inline)) {
    vf row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = loadf(b + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf x = set1(a[kLie == Lie::rows ? r * lda : r]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = Step::add_product(acc[r][v], x, row[v]);
    }
    a += kLie == Lie::rows ? 1 : lda;
    b += ldb;
  };
  int64_t i = 0;
  for (; i + 4 <= k; i += 4) {
    if (ahead) ask(*ahead);
    step();
    step();
    step();
    step();
  }
  for (; i < k; ++i) step();
  const auto whole = [&](int v) { return v < V - 1 || last == W; };
  // A branch around each of these, and none inside: the sums stay in registers.
  if (finish.accumulate)
    each(c, ldc, [&](int r, int v, float* from) {
      acc[r][v] += whole(v) ? loadf(from) : load_first<vf>(from, last);
    });
  if (finish.factor) each(c, 0, [&](int r, int v, float*) { acc[r][v] *= finish.factor[r]; });
  const auto put = [&](auto* at, int64_t ld) __attribute__((always_inline)) {
    if (last == W)
      each(at, ld, [&](int r, int v, auto* to) { store(to, rounded_to(to, acc[r][v])); });
    else
      each(at, ld, [&](int r, int v, auto* to) {
        if (v < V - 1)
          store(to, rounded_to(to, acc[r][v]));
        else
          store_first(to, rounded_to(to, acc[r][v]), last);
      });
  };
  if (finish.past_caches)
    each(out, finish.ld_out,
         [&](int r, int v, auto* to) { stream(to, rounded_to(to, acc[r][v])); });
  else if (out)
    put(out, finish.ld_out);
  else
    put(c, ldc);
}

template <class Step, Lie kLie, int V, int R = MR>
inline void tile_of(int rows, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                    float* c, int64_t ldc, int last, const Finish& finish, Ahead* ahead) {
  if (rows == R)
    tile<Step, kLie, R, V>(k, a, lda, b, ldb, c, ldc, last, finish, ahead);
  else if constexpr (R > 1)
    tile_of<Step, kLie, V, R - 1>(rows, k, a, lda, b, ldb, c, ldc, last, finish, ahead);
}

template <class Step>
void panels(int64_t m, int64_t n, int64_t depth, const float* a, const float* b, float* c,
            int64_t ldc, bool accumulate, Ahead* ahead) {
  const Finish finish{.accumulate = accumulate};
  for (int64_t j = 0; j < n; j += NR) {
    const int columns = static_cast<int>(least(NR, n - j));
    for (int64_t i = 0; i < m; i += MR) {
      const int rows = static_cast<int>(least(MR, m - i));
      const float *x = a + i * depth, *y = b + j * depth;
      float* to = c + i * ldc + j;
      if (columns > W)
        tile_of<Step, Lie::steps, 2>(rows, depth, x, MR, y, NR, to, ldc, columns - W, finish,
                                     ahead);
      else
        tile_of<Step, Lie::steps, 1>(rows, depth, x, MR, y, NR, to, ldc, columns, finish, ahead);
    }
  }
}

// V vectors of columns from j on, in tiles of even height: one of a few rows would not hide the
// latency of its products.
template <class Step, Lie kLie, int V, int R = MR>
void strip(const RowsProduct& p, int64_t depth, const float* b, int64_t j) {
  const int64_t tiles = (p.m + R - 1) / R;
  const int last = static_cast<int>(least(W, p.n - j - (V - 1) * W));
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t i = p.m * t / tiles, end = p.m * (t + 1) / tiles;
    Finish finish{p.accumulate, p.factor ? p.factor + i : nullptr, p.out, p.ld_out, p.past_caches};
    if (p.out) finish.out = static_cast<typename Step::Element*>(p.out) + i * p.ld_out + j;
    tile_of<Step, kLie, V, R>(static_cast<int>(end - i), depth,
                              p.a + (kLie == Lie::rows ? i * p.lda : i), p.lda, b, p.ldb,
                              p.c + i * p.ldc + j, p.ldc, last, finish, p.ahead);
  }
}

// Packed panels are what rows NR apart would be too: those have no second panel.
template <class Step, Lie kLie>
void unpacked(const RowsProduct& p, int64_t depth) {
  const bool panels = p.ldb == NR;
  for (int64_t j = 0; j < p.n; j += NR) {
    const float* b = p.b + (panels ? j * depth : j);
    const int64_t left = p.n - j;
    if constexpr (W == 16)
      // The last three vectors go as one tile of fewer rows: a tile of one loads as much as it
      // multiplies.
      if (!panels && left > 2 * W && left <= 3 * W) return strip<Step, kLie, 3, 9>(p, depth, b, j);
    if (left > W)
      strip<Step, kLie, 2>(p, depth, b, j);
    else
      strip<Step, kLie, 1>(p, depth, b, j);
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
    for (; i + W <= n; i += W) store(to + i, step_of<Bf16, true>(x + i, stride, t, rows, W));
    if (left) store_first(to + i, step_of<Bf16, true>(x + i, stride, t, rows, left), left);
  }
}

void transpose(int64_t m, int64_t n, const float* x, int64_t ldx, float* y, int64_t ldy) {
  for (int64_t i = 0; i < m; i += W)
    for (int64_t j = 0; j < n; j += W) {
      const int rows = static_cast<int>(least(W, m - i)),
                columns = static_cast<int>(least(W, n - j));
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
                 float* c, int64_t ldc, bool accumulate, Ahead* ahead) {
  if (pairs)
    panels<Pairs>(m, n, (k + 1) / 2, a, b, c, ldc, accumulate, ahead);
  else
    panels<Floats>(m, n, k, a, b, c, ldc, accumulate, ahead);
}

void gemm_rows(bool pairs, const RowsProduct& p) {
  if (pairs)
    (p.turned ? unpacked<Pairs, Lie::steps> : unpacked<Pairs, Lie::rows>)(p, (p.k + 1) / 2);
  else
    (p.turned ? unpacked<Floats, Lie::steps> : unpacked<Floats, Lie::rows>)(p, p.k);
}

}  // namespace p2r::cpu::P2R_ISA

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

struct F32 {
  typedef float Element;
  typedef vf Vector;
  static vf widen(vf x) { return x; }
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
};

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

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

// Lanes lie side by side: one short copy for each k. Eight steps of k at a time, so that reads
// follow the rows and writes fill whole cache lines.
template <class Type, int P>
void pack_lanes(const typename Type::Element* x, int64_t k_stride, int64_t lanes, int64_t k,
                float* out) {
  typedef typename Type::Vector Vector;
  for (int64_t k0 = 0; k0 < k; k0 += 8)
    for (int64_t lane = 0; lane < lanes; lane += P) {
      const int64_t end = least(k, k0 + 8);
      const int here = static_cast<int>(least(P, lanes - lane));
      const bool whole = here == P;
      for (int64_t i = k0; i < end; ++i) {
        const typename Type::Element* from = x + i * k_stride + lane;
        float* to = out + lane * k + i * P;
#pragma GCC unroll 4
        for (int g = 0; g < kGroups<P>; ++g) {
          const int width = lanes_of<P>(g);
          const int left = here - g * W;
          const int valid = left < 0 ? 0 : left < width ? left : width;
          // Spelt out for whole panels, whose constant widths need no loops over bytes.
          const vf v = Type::widen(!whole       ? load_first<Vector>(from + g * W, valid)
                                   : width == W ? load<Vector>(from + g * W)
                                                : load_first<Vector>(from + g * W, width));
          if (width == W)
            store(to + g * W, v);
          else
            store_first(to + g * W, v, width);
        }
      }
    }
}

// Each lane is a row along k: W x W blocks are transposed in registers.
template <class Type, int P>
void pack_rows(const typename Type::Element* x, int64_t lane_stride, int64_t lanes, int64_t k,
               float* out) {
  typedef typename Type::Vector Vector;
  for (int64_t lane = 0; lane < lanes; lane += P)
#pragma GCC unroll 4
    for (int g = 0; g < kGroups<P>; ++g) {
      const int width = lanes_of<P>(g);
      const int64_t left = lanes - lane - g * W;
      const int valid = static_cast<int>(left < 0 ? 0 : least(left, width));
      const typename Type::Element* from = x + (lane + g * W) * lane_stride;
      float* to = out + lane * k + g * W;
      for (int64_t i = 0; i < k; i += W) {
        const int steps = static_cast<int>(least(W, k - i));
        vf block[W];
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r)
          block[r] = r >= valid ? vf{}
                     : steps == W
                         ? Type::widen(load<Vector>(from + r * lane_stride + i))
                         : Type::widen(load_first<Vector>(from + r * lane_stride + i, steps));
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

template <class Type, int P>
void pack_any(const typename Type::Element* x, int64_t lane_stride, int64_t k_stride, int64_t lanes,
              int64_t k, float* out) {
  typedef typename Type::Vector Vector;
  for (int64_t lane = 0; lane < lanes; lane += P)
    for (int64_t i = 0; i < k; ++i)
      for (int g = 0; g < kGroups<P>; ++g) {
        typename Type::Element element[W] = {};
        const int64_t first = lane + g * W;
        const int width = lanes_of<P>(g);
        for (int l = 0; l < width && first + l < lanes; ++l)
          element[l] = x[(first + l) * lane_stride + i * k_stride];
        store_first(out + lane * k + i * P + g * W, Type::widen(load<Vector>(element)), width);
      }
}

template <class Type, int P>
void pack(const void* x, int64_t lane_stride, int64_t k_stride, int64_t lanes, int64_t k,
          float* out) {
  const typename Type::Element* e = static_cast<const typename Type::Element*>(x);
  if (lane_stride == 1)
    pack_lanes<Type, P>(e, k_stride, lanes, k, out);
  else if (k_stride == 1)
    pack_rows<Type, P>(e, lane_stride, lanes, k, out);
  else
    pack_any<Type, P>(e, lane_stride, k_stride, lanes, k, out);
}

template <int P>
void pack(DType type, const void* x, int64_t lane_stride, int64_t k_stride, int64_t lanes,
          int64_t k, float* out) {
  if (type == DType::f32)
    pack<F32, P>(x, lane_stride, k_stride, lanes, k, out);
  else if (type == DType::f16)
    pack<F16, P>(x, lane_stride, k_stride, lanes, k, out);
  else
    pack<Bf16, P>(x, lane_stride, k_stride, lanes, k, out);
}

// R rows and V vectors of columns of one tile, the last of which has `last` columns.
template <int R, int V>
void tile(int64_t k, const float* a, const float* b, float* c, int64_t ldc, int last,
          bool accumulate) {
  vf acc[R][V] = {};
  for (int64_t i = 0; i < k; ++i, a += MR, b += NR) {
    vf row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = loadf(b + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf x = set1(a[r]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] += x * row[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* to = c + r * ldc + v * W;
      if (v < V - 1 || last == W)
        store(to, accumulate ? loadf(to) + acc[r][v] : acc[r][v]);
      else
        store_first(to, accumulate ? load_first<vf>(to, last) + acc[r][v] : acc[r][v], last);
    }
}

template <int V, int R = MR>
inline void tile_of(int rows, int64_t k, const float* a, const float* b, float* c, int64_t ldc,
                    int last, bool accumulate) {
  if (rows == R)
    tile<R, V>(k, a, b, c, ldc, last, accumulate);
  else if constexpr (R > 1)
    tile_of<V, R - 1>(rows, k, a, b, c, ldc, last, accumulate);
}

}  // namespace

void gemm_tile_size(int* mr, int* nr) {
  *mr = MR;
  *nr = NR;
}

void pack_a(DType type, const void* x, int64_t row_stride, int64_t k_stride, int64_t m, int64_t k,
            float* out) {
  pack<MR>(type, x, row_stride, k_stride, m, k, out);
}

void pack_b(DType type, const void* x, int64_t k_stride, int64_t column_stride, int64_t k,
            int64_t n, float* out) {
  pack<NR>(type, x, column_stride, k_stride, n, k, out);
}

void gemm_panels(int64_t m, int64_t n, int64_t k, const float* a, const float* b, float* c,
                 int64_t ldc, bool accumulate) {
  for (int64_t j = 0; j < n; j += NR) {
    const int columns = static_cast<int>(least(NR, n - j));
    for (int64_t i = 0; i < m; i += MR) {
      const int rows = static_cast<int>(least(MR, m - i));
      float* to = c + i * ldc + j;
      if (columns > W)
        tile_of<2>(rows, k, a + i * k, b + j * k, to, ldc, columns - W, accumulate);
      else
        tile_of<1>(rows, k, a + i * k, b + j * k, to, ldc, columns, accumulate);
    }
  }
}

}  // namespace p2r::cpu::P2R_ISA

// The device functions of the kernels that use mma.sync, attention's and the GEMM's: whether
// ldmatrix loads the instruction's fragments from their swizzled tiles.
#include "cuda/attention/mma.cuh"

#include "cuda/gemm/mma.cuh"
#include "test/twin/hopper/checks.h"

namespace hopper {
namespace {

struct Fragments {
  const Json &a, &b, &c;
  explicit Fragments(const Json& mma) : a(mma["a"]), b(mma["b"]), c(mma["c"]) {}
};

__device__ void finish_copies() {
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
}

// ---- attention ----
constexpr int kRows = 64;  // of a tile; `left` are rows 48 to 63

// A tile as an A operand, as a B operand of Q K^T, and as a transposed B operand, of P V.
template <int D>
__global__ void attention_fragments(const bf16* x, int64_t stride, int rows, uint32_t* left,
                                    uint32_t* right, uint32_t* across) {
  using Row = TileRow<D>;
  SMEM_DYN(dynamic);
  const uint32_t tile = ptx::smem_u32(dynamic);
  copy_tile<kRows, D, 128>(tile, x, stride, rows, D);
  finish_copies();
  if (threadIdx.x >= 32) return;
  const int lane = threadIdx.x;
  uint32_t r[4];
  for (int step = 0; step < Row::kSteps; ++step) {
    ptx::ldmatrix_x4(r, Row::advance(ldmatrix_a_lane<D>(tile), 48, 2 * step));
    for (int i = 0; i < 4; ++i) left[(step * 32 + lane) * 4 + i] = r[i];
    for (int j = 0; j < kRows / 8; j += 2) {
      ptx::ldmatrix_x4(r, Row::advance(ldmatrix_b_lane<D>(tile), j * 8, 2 * step));
      for (int i = 0; i < 4; ++i)
        right[((step * (kRows / 8) + j + i / 2) * 32 + lane) * 2 + i % 2] = r[i];
    }
  }
  for (int step = 0; step < kRows / 16; ++step) {
    const auto put = [&](int j, int i, uint32_t value) {
      across[((step * (D / 8) + j) * 32 + lane) * 2 + i] = value;
    };
    for (int j = 0; j + 1 < D / 8; j += 2) {
      ptx::ldmatrix_x4<true>(r, Row::advance(ldmatrix_a_lane<D>(tile), step * 16, j));
      for (int i = 0; i < 4; ++i) put(j + i / 2, i % 2, r[i]);
    }
    if constexpr (D / 8 % 2) {
      uint32_t pair[2];
      ptx::ldmatrix_x2<true>(pair, Row::advance(ldmatrix_a_lane<D>(tile), step * 16, D / 8 - 1));
      for (int i = 0; i < 2; ++i) put(D / 8 - 1, i, pair[i]);
    }
  }
}

template <int D>
void check_attention_tile(const Fragments& mma, Group& group) {
  constexpr int steps = TileRow<D>::kSteps, tiles = kRows / 8, stride = D + 8, rows = kRows - 3;
  Codes x(size_t(kRows * stride), [](size_t i) { return i + 1; });
  const auto code = [&](int row, int column) {
    return row < rows && column < D ? row * stride + column + 1 : 0;
  };
  std::vector<uint16_t> left(steps * 32 * 8), right(steps * tiles * 32 * 4);
  std::vector<uint16_t> across(kRows / 16 * (D / 8) * 32 * 4);
  const auto words = [](std::vector<uint16_t>& v) { return reinterpret_cast<uint32_t*>(v.data()); };
  run(group, attention_fragments<D>, 128, x.as_bf16(), int64_t{stride}, rows, words(left),
      words(right), words(across));
  for (int i = 0; i < int(left.size()); ++i) {
    const int at = mma.a[size_t(i / 8 % 32)][size_t(i % 8)], step = i / 8 / 32;
    group.expect(left[size_t(i)] == code(48 + at / 16, 16 * step + at % 16),
                 "left, step %d lane %d value %d", step, i / 8 % 32, i % 8);
  }
  for (int i = 0; i < int(right.size()); ++i) {
    const int at = mma.b[size_t(i / 4 % 32)][size_t(i % 4)], tile = i / 4 / 32 % tiles;
    const int step = i / 4 / 32 / tiles;
    group.expect(right[size_t(i)] == code(8 * tile + at / 16, 16 * step + at % 16),
                 "right, step %d tile %d lane %d value %d", step, tile, i / 4 % 32, i % 4);
  }
  for (int i = 0; i < int(across.size()); ++i) {
    const int at = mma.b[size_t(i / 4 % 32)][size_t(i % 4)], tile = i / 4 / 32 % (D / 8);
    const int step = i / 4 / 32 / (D / 8);
    group.expect(across[size_t(i)] == code(16 * step + at % 16, 8 * tile + at / 16),
                 "across, step %d tile %d lane %d value %d", step, tile, i / 4 % 32, i % 4);
  }
}

// A product's entries as the next one's left operand; rows and columns apart.
__global__ void reuse_product(const float* in, uint32_t* out) {
  float s[1][8][4];
  uint32_t w[1][4][4];
  for (int i = 0; i < 32; ++i) s[0][i / 4][i % 4] = in[threadIdx.x * 32 + i];
  pack_operand<bf16>(w, s);
  for (int i = 0; i < 16; ++i) out[threadIdx.x * 16 + i] = w[0][i / 4][i % 4];
}

void check_reuse(const Fragments& mma, Group& group) {
  for (const bool rows : {false, true}) {
    std::vector<float> in(32 * 32);
    std::vector<uint16_t> out(32 * 32);
    for (int i = 0; i < 32 * 32; ++i) {
      const int at = mma.c[size_t(i / 32)][size_t(i % 4)], tile = i % 32 / 4;
      in[size_t(i)] = float(rows ? at / 8 : 8 * tile + at % 8);
    }
    run(group, reuse_product, 32, in.data(), reinterpret_cast<uint32_t*>(out.data()));
    for (int i = 0; i < 32 * 32; ++i) {
      const int at = mma.a[size_t(i / 32)][size_t(i % 8)], k = i % 32 / 8;
      group.expect(out[size_t(i)] == bits_of<bf16>(float(rows ? at / 16 : 16 * k + at % 16)),
                   "lane %d k %d value %d", i / 32, k, i % 8);
    }
  }
}

// ---- GEMM ----
template <Major major, bool IsA>
__global__ void gemm_fragments(Operand<bf16> x, int64_t across, int64_t k, uint32_t* out) {
  SMEM_DYN(dynamic);
  const uint32_t tile = ptx::smem_u32(dynamic);
  gemm_mma::load_tile<major>(tile, x, gemm_mma::kM, across, gemm_mma::kK, k);
  finish_copies();
  if (threadIdx.x >= 32) return;
  for (int i = 0; i < 16; ++i) {
    uint32_t r[4];
    gemm_mma::load_fragment<major, IsA>(r, tile, i / 2 * 16, i % 2 * 16);
    for (int j = 0; j < 4; ++j) out[(i * 32 + threadIdx.x) * 4 + j] = r[j];
  }
}

// The second tile of both axes, which the operand ends within.
template <Major major, bool IsA>
void check_gemm_tile(const Fragments& mma, Group& group) {
  constexpr int kM = gemm_mma::kM, kK = gemm_mma::kK;
  static_assert(kM == 8 * 16 && kK == 2 * 16);
  constexpr int across = 2 * kM - 24, k = 2 * kK - 8;
  constexpr int line = major == Major::k ? k : across, lines = major == Major::k ? across : k;
  Codes x(size_t(line * lines), [](size_t i) { return i + 1; });
  std::vector<uint16_t> out(16 * 32 * 8);
  run(group, gemm_fragments<major, IsA>, 128, Operand<bf16>{x.as_bf16(), line}, int64_t{across},
      int64_t{k}, reinterpret_cast<uint32_t*>(out.data()));
  for (int i = 0; i < int(out.size()); ++i) {
    const int v = i % 8, lane = i / 8 % 32, part = i / 8 / 32;
    const int at = IsA ? mma.a[size_t(lane)][size_t(v)] : mma.b[size_t(lane)][size_t(v % 4)];
    const int row = kM + part / 2 * 16 + (IsA ? 0 : v / 4 * 8) + at / 16;
    const int column = kK + part % 2 * 16 + at % 16;
    const size_t element = size_t(major == Major::k ? row * line + column : column * line + row);
    group.expect(out[size_t(i)] == (row < across && column < k ? x.data()[element] : 0),
                 "%c %s-major, part %d lane %d value %d", IsA ? 'A' : 'B',
                 major == Major::k ? "k" : "mn", part, lane, v);
  }
}

}  // namespace

void check_mma_kernels(const Tables& tables, Checks& checks) {
  const Fragments mma(tables.fragments["mma_m16n8k16"]);
  Group& attention = checks["attention by mma: fragments"];
  check_attention_tile<32>(mma, attention);
  check_attention_tile<64>(mma, attention);
  check_attention_tile<72>(mma, attention);
  check_attention_tile<80>(mma, attention);
  check_attention_tile<96>(mma, attention);
  check_attention_tile<128>(mma, attention);
  check_reuse(mma, checks["attention by mma: products as operands"]);
  Group& gemm = checks["gemm_mma fragments"];
  check_gemm_tile<Major::k, true>(mma, gemm);
  check_gemm_tile<Major::mn, true>(mma, gemm);
  check_gemm_tile<Major::k, false>(mma, gemm);
  check_gemm_tile<Major::mn, false>(mma, gemm);
}

}  // namespace hopper

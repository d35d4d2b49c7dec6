// The mass of each key, "mma": on the tensor cores of sm_80 and later (mma.cuh), for f16 and bf16.
//
// A block owns some keys of one sequence and head and loops over the queries, whose tiles are
// loaded through a ring of two stages. Keys are the rows, as in the backward pass: S^T = K Q^T,
// whose rows are summed in registers. Fragments of K stay in registers up to D = 80.
#include "cuda/attention/mma.cuh"

namespace p2r::cuda {

namespace {

constexpr int kStages = 2;

// scale S - lse is subtracted before the factor of log2(e): two large products of log2(e) would
// cancel with a larger error.
template <class T, int D, bool Large>
__global__ void __launch_bounds__(single_tile(Large).threads(), single_tile(Large).blocks)
    attention_mass_mma_kernel(AttentionProblem<T> a, AttentionGrid grid, const float* lse,
                              float* mass) {
  constexpr MmaTile kTile = single_tile(Large);
  constexpr int M = kTile.m, N = kTile.step / 8, kThreads = kTile.threads();
  constexpr int kStepBytes = kTile.step * TileRow<D>::kBytes;
  constexpr bool kKInRegisters = D <= 80;
  SMEM_DYN(memory);
  SMEM_ARRAY(float, lse_stages, kTile.step* kStages);
  const uint32_t k_tile = ptx::smem_u32(memory);
  const uint32_t ring = k_tile + kTile.rows() * TileRow<D>::kBytes;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * M;
  const uint32_t k_lane = ldmatrix_a_lane<D>(k_tile + row * TileRow<D>::kBytes);
  const BlockTile own = block_tile(a, grid);
  const int length = own.tile.length;
  const T* q = a.q + own.tile.begin * a.qk_row + own.column;
  const float* lse_head = lse + own.head * a.tokens + own.tile.begin;
  const auto issue = [&](int query, int stage) {
    copy_tile<kTile.step, D, kThreads>(ring + stage * kStepBytes, q + query * a.qk_row, a.qk_row,
                                       length - query, a.d);
    ptx::cp_async_commit();
  };
  // A query past the end has lse inf, hence P = 0.
  const auto load_lse = [&](int query) {
    const bool inside = threadIdx.x < kTile.step && static_cast<int>(threadIdx.x) < length - query;
    return inside ? lse_head[query + threadIdx.x] : INFINITY;
  };
  const auto store_lse = [&](float value, int stage) {
    if (threadIdx.x < kTile.step) lse_stages[stage * kTile.step + threadIdx.x] = value;
  };

  copy_tile<kTile.rows(), D, kThreads>(k_tile, a.k + own.token * a.qk_row + own.column, a.qk_row,
                                       own.rows, a.d);
  issue(0, 0);
  store_lse(load_lse(0), 0);
  uint32_t k_fragments[kKInRegisters ? M : 1][kKInRegisters ? TileRow<D>::kSteps : 1][4];
  float sum[M][2] = {};
  int stage = 0;
  for (int query = 0; query < length; query += kTile.step) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage is complete, and the other no longer read
    const bool more = length - query > kTile.step;
    float next_lse = 0;
    if (more) {
      issue(query + kTile.step, stage ^ 1);
      next_lse = load_lse(query + kTile.step);
    }
    if constexpr (kKInRegisters) {
      if (query == 0) {
#pragma unroll
        for (int i = 0; i < M; ++i)
#pragma unroll
          for (int step = 0; step < TileRow<D>::kSteps; ++step)
            ptx::ldmatrix_x4(k_fragments[i][step], TileRow<D>::advance(k_lane, i * 16, 2 * step));
      }
    }
    float s[M][N][4];
    gemm_nt<T, D>(s, ring + stage * kStepBytes, 0, [&](uint32_t(&x)[4], int i, int step) {
      if constexpr (kKInRegisters) {
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] = k_fragments[i][step][e];
      } else {
        ptx::ldmatrix_x4(x, TileRow<D>::advance(k_lane, i * 16, 2 * step));
      }
    });
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float2 lse_pair =
          *reinterpret_cast<const float2*>(lse_stages + stage * kTile.step + j * 8 + lane % 4 * 2);
#pragma unroll
      for (int i = 0; i < M; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          sum[i][e / 2] +=
              ptx::ex2((s[i][j][e] * a.scale - (e % 2 ? lse_pair.y : lse_pair.x)) * kLog2e);
    }
    if (more) store_lse(next_lse, stage ^ 1);
    stage ^= 1;
  }
#pragma unroll
  for (int i = 0; i < M; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = sum[i][h];
      total += __shfl_xor_sync(0xFFFFFFFFu, total, 1);
      total += __shfl_xor_sync(0xFFFFFFFFu, total, 2);
      const int r = row + i * 16 + h * 8 + lane / 4;
      if (lane % 4 == 0 && r < own.rows) mass[own.head * a.tokens + own.token + r] = total;
    }
}

}  // namespace

void mma_attention_mass(const AttentionMassArgs& a, Device& device) {
  const AttentionLayout in = attention_layout(a.q, a.k, View(), a.qkv);
  with_half_type(in.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const AttentionOnDevice<T> call(in, a.cos, a.sin, a.scale, device);
    with_mma_tiles(in.head_dim, a.cu_seqlens, [&](auto dim, auto large) {
      constexpr int D = decltype(dim)::value;
      constexpr MmaTile kTile = single_tile(decltype(large)::value);
      run_mma(call, attention_mass_mma_kernel<T, D, decltype(large)::value>, a.cu_seqlens, kTile,
              single_tile_smem<D>(kTile, kStages), a.lse.as<const float>(), a.mass.as<float>());
    });
  });
}

}  // namespace p2r::cuda

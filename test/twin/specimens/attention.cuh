// A small flash attention in the style of sm_80. A block owns 64 queries, a warp 16 of them; K and
// V are loaded in tiles of 64, double-buffered by cp.async, 16-byte chunks swizzled by row. Layout
// [batch * heads][tokens][D].
#pragma once
#include "cuda/ptx.cuh"

namespace specimens {
using namespace p2r::cuda;

namespace attention_bug {
enum {
  none,
  no_first_barrier,
  waits_too_little,
  tail_not_masked,
  no_second_barrier,
  stores_past_end
};
}

template <int D>
constexpr size_t attention_smem = (64 + 4 * 64) * D * 2;

template <class T, int D, bool Causal, int Bug>
__global__ void __launch_bounds__(128)
    attention(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,
              T* __restrict__ o, float* __restrict__ lse, int nq, int nk, float scale_log2) {
  constexpr int tile = 64, row_chunks = D / 8, tile_bytes = tile * D * 2;
  SMEM_DYN(bytes);
  const uint32_t sq = ptx::smem_u32(bytes), sk = sq + tile_bytes, sv = sk + 2 * tile_bytes;
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, m0 = blockIdx.x * tile;
  const int64_t head = blockIdx.y;
  q += head * nq * D;
  o += head * nq * D;
  lse += head * nq;
  k += head * nk * D;
  v += head * nk * D;

  const auto at = [](uint32_t base, int row, int chunk) {
    return base + row * (D * 2) + ((chunk ^ (row & 7)) << 4);
  };
  const auto load = [&](uint32_t dst, const T* src, int first, int n) {
#pragma unroll 1
    for (int i = tid; i < tile * row_chunks; i += 128) {
      const int row = i / row_chunks, chunk = i % row_chunks;
      const bool inside = first + row < n;
      ptx::cp_async16(at(dst, row, chunk), src + int64_t(inside ? first + row : 0) * D + chunk * 8,
                      inside);
    }
  };

  int tiles = (nk + tile - 1) / tile;
  if (Causal) tiles = max(0, min(tiles, (m0 + tile + (nk - nq) + tile - 1) / tile));
  load(sq, q, m0, nq);
  load(sk, k, 0, nk);
  ptx::cp_async_commit();
  load(sv, v, 0, nk);
  ptx::cp_async_commit();

  float acc[D / 8][4] = {}, row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0.f, 0.f};
  uint32_t qf[D / 16][4];
  for (int t = 0; t < tiles; ++t) {
    const uint32_t kt = sk + (t & 1) * tile_bytes, vt = sv + (t & 1) * tile_bytes;
    const uint32_t next = ((t + 1) & 1) * tile_bytes;
    // This tile of K is complete; that of V may still be in flight.
    ptx::cp_async_wait<Bug == attention_bug::waits_too_little ? 2 : 1>();
    if (Bug != attention_bug::no_first_barrier) __syncthreads();
    if (t == 0) {
#pragma unroll
      for (int kk = 0; kk < D / 16; ++kk)
        ptx::ldmatrix_x4(qf[kk], at(sq, warp * 16 + (lane & 15), kk * 2 + (lane >> 4)));
    }
    if (t + 1 < tiles) load(sk + next, k, (t + 1) * tile, nk);
    ptx::cp_async_commit();

    float s[tile / 8][4] = {};
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
#pragma unroll
      for (int nb = 0; nb < tile / 16; ++nb) {
        uint32_t r[4];
        ptx::ldmatrix_x4(
            r, at(kt, nb * 16 + (lane & 7) + ((lane >> 4) << 3), kk * 2 + ((lane >> 3) & 1)));
        const uint32_t b0[2] = {r[0], r[1]}, b1[2] = {r[2], r[3]};
        ptx::mma_m16n8k16<T>(s[nb * 2], qf[kk], b0);
        ptx::mma_m16n8k16<T>(s[nb * 2 + 1], qf[kk], b1);
      }
    }

    float new_max[2] = {row_max[0], row_max[1]};
#pragma unroll
    for (int nb = 0; nb < tile / 8; ++nb) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int col = t * tile + nb * 8 + (lane & 3) * 2 + (j & 1);
        const int row = m0 + warp * 16 + (lane >> 2) + (j >> 1) * 8;
        const bool seen = (Bug == attention_bug::tail_not_masked || col < nk) &&
                          (!Causal || col <= row + nk - nq);
        s[nb][j] = seen ? s[nb][j] * scale_log2 : -INFINITY;
        new_max[j >> 1] = fmaxf(new_max[j >> 1], s[nb][j]);
      }
    }
    uint32_t p[tile / 16][4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      new_max[h] = fmaxf(new_max[h], __shfl_xor_sync(~0u, new_max[h], 1));
      new_max[h] = fmaxf(new_max[h], __shfl_xor_sync(~0u, new_max[h], 2));
      const float base = new_max[h] == -INFINITY ? 0.f : new_max[h];
      const float shrink = ptx::ex2(row_max[h] - base);
      row_max[h] = new_max[h];
      float sum = 0.f;
#pragma unroll
      for (int nb = 0; nb < tile / 8; ++nb) {
        const float e0 = ptx::ex2(s[nb][h * 2] - base), e1 = ptx::ex2(s[nb][h * 2 + 1] - base);
        sum += e0 + e1;
        p[nb / 2][(nb & 1) * 2 + h] = ptx::pack2<T>(e0, e1);
      }
      row_sum[h] = row_sum[h] * shrink + sum;
#pragma unroll
      for (int d = 0; d < D / 8; ++d) {
        acc[d][h * 2] *= shrink;
        acc[d][h * 2 + 1] *= shrink;
      }
    }

    ptx::cp_async_wait<1>();
    if (Bug != attention_bug::no_second_barrier) __syncthreads();
    if (t + 1 < tiles) load(sv + next, v, (t + 1) * tile, nk);
    ptx::cp_async_commit();
#pragma unroll
    for (int kk = 0; kk < tile / 16; ++kk) {
#pragma unroll
      for (int db = 0; db < D / 16; ++db) {
        uint32_t r[4];
        ptx::ldmatrix_x4<true>(r, at(vt, kk * 16 + (lane & 15), db * 2 + (lane >> 4)));
        const uint32_t b0[2] = {r[0], r[1]}, b1[2] = {r[2], r[3]};
        ptx::mma_m16n8k16<T>(acc[db * 2], p[kk], b0);
        ptx::mma_m16n8k16<T>(acc[db * 2 + 1], p[kk], b1);
      }
    }
  }
  ptx::cp_async_wait<0>();

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    row_sum[h] += __shfl_xor_sync(~0u, row_sum[h], 1);
    row_sum[h] += __shfl_xor_sync(~0u, row_sum[h], 2);
    const int row = m0 + warp * 16 + (lane >> 2) + h * 8;
    const float inverse = row_sum[h] > 0.f ? 1.f / row_sum[h] : 0.f;
    if (Bug == attention_bug::stores_past_end || row < nq) {
#pragma unroll
      for (int d = 0; d < D / 8; ++d)
        *reinterpret_cast<uint32_t*>(o + int64_t(row) * D + d * 8 + (lane & 3) * 2) =
            ptx::pack2<T>(acc[d][h * 2] * inverse, acc[d][h * 2 + 1] * inverse);
      if ((lane & 3) == 0)
        lse[row] = row_sum[h] > 0.f ? (row_max[h] + ptx::lg2(row_sum[h])) * 0.69314718f : -INFINITY;
    }
  }
}

}  // namespace specimens

// Attention on the tensor cores of sm_80 and later, forward, and the mass of each key.
//
// Forward: a block owns some queries of one sequence and head, and each warp some of those with
// their running maximum, sum and output. K and V come in tiles of 64 keys, in turn, through a ring
// of three tiles that cp.async fills: while one is multiplied, the next has come and the one after
// is under way, at the price of one barrier a tile. P goes from the accumulators of Q K^T straight
// into the product with V. Of global memory a block reads Q once and its sequence's K and V, which
// other blocks of the head read at the same time and the L2 cache therefore holds, and writes out
// once.
//
// The exponential is 2^x with scale and log2(e) in one multiply-add; the maximum is taken before
// it, of the products times the scale's sign. Weights are rounded to the type for the product with
// V, but not for their sum.
//
// Why these tiles: large ones have 128 queries and 4 warps of 32, which is what registers hold (at
// D = 128, 128 of output and 64 of logits a thread), and 80 KB of shared memory at most, so that
// two blocks fit where there are 164 KB and one where there are 100. A window of 64 tokens is one
// small tile of 64 queries and one of keys, 4 warps of 16: a block a window and head, and three or
// more of them to a multiprocessor, since such a block mostly waits for memory.
#include "cuda/attention/mma.cuh"

namespace p2r::cuda {

namespace {

constexpr int kRing = 3, kMassRing = 2;

constexpr MmaTile forward_tile(bool large) {
  return large ? MmaTile{.m = 2, .warps = 4, .step = 64, .blocks = 2}
               : MmaTile{.m = 1, .warps = 4, .step = 64, .blocks = 3};
}

template <int D>
constexpr size_t forward_smem(const MmaTile& tile, int ring) {
  return static_cast<size_t>(tile.rows() + ring * tile.step) * TileRow<D>::kBytes;
}

template <class T, int D, bool Large>
__global__ void __launch_bounds__(forward_tile(Large).threads(), forward_tile(Large).blocks)
    attention_mma_kernel(AttentionProblem<T> a, AttentionGrid grid, T* out, float* lse) {
  constexpr MmaTile kTile = forward_tile(Large);
  constexpr int M = kTile.m, N = kTile.step / 8, kThreads = kTile.threads();
  constexpr int kStepBytes = kTile.step * TileRow<D>::kBytes;
  constexpr bool kHoldsQ = D <= 80;  // in registers, where there is room
  SMEM_DYN(memory);
  const uint32_t q_tile = ptx::smem_u32(memory);
  const uint32_t ring = q_tile + kTile.rows() * TileRow<D>::kBytes;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * M;
  const uint32_t q_lane = left_lane<D>(q_tile + row * TileRow<D>::kBytes);
  const AttentionShare own = share_of(a, grid);
  const int length = own.tile.length;
  const T* k = a.k + own.tile.begin * a.qk_row + own.column;
  const T* v = a.v + own.tile.begin * a.v_row + own.column;

  // Item 2 n of the ring is keys n, item 2 n + 1 their values.
  const int items = static_cast<int>(2 * ceil_div(length, kTile.step));
  const auto issue = [&](int item, int slot) {
    if (item < items) {
      const int key = item / 2 * kTile.step;
      const bool is_v = item % 2;
      const int64_t stride = is_v ? a.v_row : a.qk_row;
      copy_tile<kTile.step, D, kThreads>(ring + slot * kStepBytes, (is_v ? v : k) + key * stride,
                                         stride, length - key, a.d);
    }
    ptx::cp_async_commit();
  };
  // Waits for the item in `slot`, and has the one that takes its predecessor's place started.
  const auto next = [&](int item, int slot) {
    ptx::cp_async_wait<kRing - 2>();
    __syncthreads();
    issue(item + kRing - 1, slot == 0 ? kRing - 1 : slot - 1);
    return ring + slot * kStepBytes;
  };

  copy_tile<kTile.rows(), D, kThreads>(q_tile, a.q + own.token * a.qk_row + own.column, a.qk_row,
                                       own.rows, a.d);
#pragma unroll
  for (int i = 0; i < kRing - 1; ++i) issue(i, i);

  // Of a thread's rows, lane / 4 and lane / 4 + 8 of each 16: the maximum and sum so far.
  float o[M][D / 8][4] = {}, top[M][2], sum[M][2];
#pragma unroll
  for (int i = 0; i < M; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[i][h] = -INFINITY;
      sum[i][h] = 0;
    }
  const float scale = fabsf(a.scale) * kLog2e;
  uint32_t held[kHoldsQ ? M : 1][kHoldsQ ? TileRow<D>::kSteps : 1][4];
  int slot = 0;
  for (int item = 0; item < items; item += 2) {
    const uint32_t k_tile = next(item, slot);
    slot = slot == kRing - 1 ? 0 : slot + 1;
    if constexpr (kHoldsQ) {
      if (item == 0) {
#pragma unroll
        for (int i = 0; i < M; ++i)
#pragma unroll
          for (int step = 0; step < TileRow<D>::kSteps; ++step)
            ptx::ldmatrix_x4(held[i][step], TileRow<D>::move(q_lane, i * 16, 2 * step));
      }
    }
    float s[M][N][4];
    multiply_rows<T, D>(s, k_tile, 0, [&](uint32_t(&x)[4], int i, int step) {
      if constexpr (kHoldsQ) {
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] = held[i][step][e];
      } else {
        ptx::ldmatrix_x4(x, TileRow<D>::move(q_lane, i * 16, 2 * step));
      }
    });

    if (a.scale < 0) {
#pragma unroll
      for (int i = 0; i < M; ++i)
#pragma unroll
        for (int j = 0; j < N; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) s[i][j][e] = -s[i][j][e];
    }
    // Keys that there are, counted from this thread's first column.
    const int left = length - item / 2 * kTile.step - lane % 4 * 2;
    const bool ragged = length - item / 2 * kTile.step < kTile.step;
    if (ragged) {
#pragma unroll
      for (int i = 0; i < M; ++i)
#pragma unroll
        for (int j = 0; j < N; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (j * 8 + e % 2 >= left) s[i][j][e] = -INFINITY;
    }
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float most = s[i][0][2 * h];
#pragma unroll
        for (int j = 0; j < N; ++j) most = fmaxf(most, fmaxf(s[i][j][2 * h], s[i][j][2 * h + 1]));
        most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, 2));
        most = fmaxf(top[i][h], most * scale);
        // Where every logit so far is -inf, all weights are 0, not exp(-inf + inf).
        const float shift = most == -INFINITY ? 0.0f : most;
        const float decay = ptx::ex2(top[i][h] - shift);
        top[i][h] = most;
        sum[i][h] *= decay;
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
          o[i][j][2 * h] *= decay;
          o[i][j][2 * h + 1] *= decay;
        }
#pragma unroll
        for (int j = 0; j < N; ++j)
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) s[i][j][e] = ptx::ex2(s[i][j][e] * scale - shift);
      }
    // Again, for a scale of 0: 0 * -inf is NaN.
    if (ragged) {
#pragma unroll
      for (int i = 0; i < M; ++i)
#pragma unroll
        for (int j = 0; j < N; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (j * 8 + e % 2 >= left) s[i][j][e] = 0;
    }
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
      for (int j = 0; j < N; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[i][e / 2] += s[i][j][e];
    uint32_t p[M][N / 2][4];
    as_operand<T>(p, s);
    const uint32_t v_tile = next(item + 1, slot);
    slot = slot == kRing - 1 ? 0 : slot + 1;
    multiply_add<T, D>(o, p, v_tile, 0);
  }

  ptx::cp_async_wait<0>();  // only empty groups are left
  // A warp's rows of out take the place of its rows of Q, which no other warp reads.
  __syncwarp();
#pragma unroll
  for (int i = 0; i < M; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = sum[i][h];
      total += __shfl_xor_sync(0xFFFFFFFFu, total, 1);
      total += __shfl_xor_sync(0xFFFFFFFFu, total, 2);
      const int r = row + i * 16 + h * 8 + lane / 4;
      if (lane % 4 == 0 && r < own.rows)
        lse[own.head * a.tokens + own.token + r] = top[i][h] * kLn2 + ptx::lg2(total) * kLn2;
      const float inverse = 1.0f / total;
#pragma unroll
      for (int j = 0; j < D / 8; ++j)
        *reinterpret_cast<uint32_t*>(memory + TileRow<D>::at(r, j) + lane % 4 * 4) =
            ptx::pack2<T>(o[i][j][2 * h] * inverse, o[i][j][2 * h + 1] * inverse);
    }
  __syncwarp();
  const int64_t out_row = int64_t{a.heads} * a.d;
#pragma unroll
  for (int i = lane; i < M * 16 * (D / 8); i += 32) {
    const int r = row + i / (D / 8), c = i % (D / 8);
    if (r < own.rows && c * 8 < a.d)
      *reinterpret_cast<uint4*>(out + (own.token + r) * out_row + own.column + c * 8) =
          *reinterpret_cast<const uint4*>(memory + TileRow<D>::at(r, c));
  }
}

// Keys are rows here, as in the backward (cuda/attention/mma_backward.cu): S^T = K Q^T, whose rows
// the block's threads add up. Fragments of K stay in registers up to D = 80. The exponent is taken
// before its factor of log2(e): large logits and an lse times that would leave less of it.
template <class T, int D, bool Large>
__global__ void __launch_bounds__(forward_tile(Large).threads(), forward_tile(Large).blocks)
    attention_mass_mma_kernel(AttentionProblem<T> a, AttentionGrid grid, const float* lse,
                              float* mass) {
  constexpr MmaTile kTile = forward_tile(Large);
  constexpr int M = kTile.m, N = kTile.step / 8, kThreads = kTile.threads();
  constexpr int kStepBytes = kTile.step * TileRow<D>::kBytes;
  constexpr bool kHoldsK = D <= 80;
  SMEM_DYN(memory);
  SMEM_ARRAY(float, shifts, 2 * kTile.step);
  const uint32_t k_tile = ptx::smem_u32(memory);
  const uint32_t ring = k_tile + kTile.rows() * TileRow<D>::kBytes;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * M;
  const uint32_t k_lane = left_lane<D>(k_tile + row * TileRow<D>::kBytes);
  const AttentionShare own = share_of(a, grid);
  const int length = own.tile.length;
  const T* q = a.q + own.tile.begin * a.qk_row + own.column;
  const float* lse_head = lse + own.head * a.tokens + own.tile.begin;
  const auto issue = [&](int query, int place) {
    copy_tile<kTile.step, D, kThreads>(ring + place * kStepBytes, q + query * a.qk_row, a.qk_row,
                                       length - query, a.d);
    ptx::cp_async_commit();
  };
  // A query past the end has lse inf, and so weighs nothing.
  const auto shift_of = [&](int query) {
    const bool inside = threadIdx.x < kTile.step && static_cast<int>(threadIdx.x) < length - query;
    return inside ? lse_head[query + threadIdx.x] : INFINITY;
  };
  const auto put = [&](float shift, int place) {
    if (threadIdx.x < kTile.step) shifts[place * kTile.step + threadIdx.x] = shift;
  };

  copy_tile<kTile.rows(), D, kThreads>(k_tile, a.k + own.token * a.qk_row + own.column, a.qk_row,
                                       own.rows, a.d);
  issue(0, 0);
  put(shift_of(0), 0);
  uint32_t held[kHoldsK ? M : 1][kHoldsK ? TileRow<D>::kSteps : 1][4];
  float sum[M][2] = {};
  int place = 0;
  for (int query = 0; query < length; query += kTile.step) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // the tile is there, and the other place is done with
    const bool more = length - query > kTile.step;
    float next = 0;
    if (more) {
      issue(query + kTile.step, place ^ 1);
      next = shift_of(query + kTile.step);
    }
    if constexpr (kHoldsK) {
      if (query == 0) {
#pragma unroll
        for (int i = 0; i < M; ++i)
#pragma unroll
          for (int step = 0; step < TileRow<D>::kSteps; ++step)
            ptx::ldmatrix_x4(held[i][step], TileRow<D>::move(k_lane, i * 16, 2 * step));
      }
    }
    float s[M][N][4];
    multiply_rows<T, D>(s, ring + place * kStepBytes, 0, [&](uint32_t(&x)[4], int i, int step) {
      if constexpr (kHoldsK) {
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] = held[i][step][e];
      } else {
        ptx::ldmatrix_x4(x, TileRow<D>::move(k_lane, i * 16, 2 * step));
      }
    });
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float2 shift =
          *reinterpret_cast<const float2*>(shifts + place * kTile.step + j * 8 + lane % 4 * 2);
#pragma unroll
      for (int i = 0; i < M; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          sum[i][e / 2] += ptx::ex2((s[i][j][e] * a.scale - (e % 2 ? shift.y : shift.x)) * kLog2e);
    }
    if (more) put(next, place ^ 1);
    place ^= 1;
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

void mma_attention(const AttentionArgs& a, Device& device) {
  const AttentionLayout in = attention_layout(a.q, a.k, a.v, a.qkv);
  with_half_type(in.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const AttentionOnDevice<T> call(in, a.cos, a.sin, a.scale, device);
    with_mma_tiles(in.head_dim, a.cu_seqlens, [&](auto dim, auto large) {
      constexpr int D = decltype(dim)::value;
      constexpr MmaTile kTile = forward_tile(decltype(large)::value);
      run_mma(call, attention_mma_kernel<T, D, decltype(large)::value>, a.cu_seqlens, kTile,
              forward_smem<D>(kTile, kRing), a.out.as<T>(), a.lse.as<float>());
    });
  });
}

void mma_attention_mass(const AttentionMassArgs& a, Device& device) {
  const AttentionLayout in = attention_layout(a.q, a.k, View(), a.qkv);
  with_half_type(in.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const AttentionOnDevice<T> call(in, a.cos, a.sin, a.scale, device);
    with_mma_tiles(in.head_dim, a.cu_seqlens, [&](auto dim, auto large) {
      constexpr int D = decltype(dim)::value;
      constexpr MmaTile kTile = forward_tile(decltype(large)::value);
      run_mma(call, attention_mass_mma_kernel<T, D, decltype(large)::value>, a.cu_seqlens, kTile,
              forward_smem<D>(kTile, kMassRing), a.lse.as<const float>(), a.mass.as<float>());
    });
  });
}

}  // namespace p2r::cuda

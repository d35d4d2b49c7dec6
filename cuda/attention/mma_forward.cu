// Attention, forward, "mma": on the tensor cores of sm_80 and later (mma.cuh).
//
// A block owns some rows of one sequence and key head, and each warp some of those with their
// running maximum, sum and output. A row is a query of one head; with grouped heads (grouped.cuh) a
// query has a row for each head of the group, so that a key is loaded once for all of them. K and V
// are loaded alternately in tiles of 64 keys, through a ring of three stages that cp.async fills:
// while one is multiplied, the next is complete and the one after is in flight, at the price of one
// barrier a tile. P is packed from the accumulators of Q K^T straight into the A operand of the
// product with V. A block reads Q from global memory once, and its sequence's K and V, which other
// blocks of the head read at the same time and are therefore L2 hits, and writes out once.
//
// The exponential is 2^x with scale and log2(e) in one multiply-add; the maximum is taken before
// it, of the products times the scale's sign. P is rounded to the type for the product with V, but
// not for its row sums.
//
// Where rows see different keys, a block loops to the last that one of its rows sees, and tiles
// that all see are not masked: of 4096 causal tokens with two heads a key head, one tile of a
// block's 33 on average. A warp leaves out tiles that none of its rows sees. A tile of keys begins
// at a multiple of 64 of the sequence's keys, shared ones first, wherever they are stored, and a
// masked key adds exact zeros: so a row's bits depend on its query and the keys that it sees, not
// on the other rows, nor on pages, nor on how queries are divided into calls.
//
// Why these tiles: large ones have 128 rows and 4 warps of 32, which is what registers hold (at
// D = 128, 128 of output and 64 of logits a thread), and 80 KB of shared memory at most, so that
// two blocks fit where there are 164 KB and one where there are 100. A window of 64 tokens is one
// small tile of 64 queries and one of keys, 4 warps of 16: a block a window and head, and three or
// more of them to a multiprocessor, since such a block mostly waits for memory.
//
// Prediction for 4096 causal tokens, 16 heads of 128 on 8 key heads (no GPU has run this yet):
// 69 GFLOP of useful work, 3 % more in masked tiles. mma.sync reaches some 60 % of an H200's 990
// TFLOP/s, and as the exponentials run beside the products of the other block only, half of that is
// left: 300 TFLOP/s, 0.23 ms. 512 blocks are two rounds of 264, those with most keys first, so the
// last ones to start are short.
#include "cuda/attention/mma.cuh"

namespace p2r::cuda {

namespace {

constexpr int kStages = 3;

template <class Block, int D, bool Large>
__global__ void __launch_bounds__(single_tile(Large).threads(), single_tile(Large).blocks)
    attention_mma_kernel(typename Block::Problem a, AttentionGrid grid,
                         typename Block::Element* out, float* lse) {
  using T = typename Block::Element;
  constexpr MmaTile kTile = single_tile(Large);
  constexpr int M = kTile.m, N = kTile.step / 8, kThreads = kTile.threads();
  constexpr int kStepBytes = kTile.step * TileRow<D>::kBytes;
  constexpr bool kQInRegisters = D <= 80;  // if enough are left
  SMEM_DYN(memory);
  const uint32_t q_tile = ptx::smem_u32(memory);
  const uint32_t ring = q_tile + kTile.rows() * TileRow<D>::kBytes;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * M;
  const uint32_t q_lane = ldmatrix_a_lane<D>(q_tile + row * TileRow<D>::kBytes);
  const Block own(a, grid, kTile.rows());

  // Item 2 n of the ring is the n-th tile of K, item 2 n + 1 that of V.
  const int items = static_cast<int>(2 * ceil_div(own.keys, kTile.step));
  const auto issue = [&](int item, int stage) {
    if (item < items) {
      const int key = item / 2 * kTile.step;
      const bool is_v = item % 2;
      const auto place = own.key_rows(is_v, key);
      copy_rows<kTile.step, D, kThreads>(ring + stage * kStepBytes, own.keys - key, a.d, place);
    }
    ptx::cp_async_commit();
  };
  // Waits for the item in `stage`, and starts loading the one that replaces its predecessor.
  const auto wait_and_prefetch = [&](int item, int stage) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();
    issue(item + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
    return ring + stage * kStepBytes;
  };

  copy_rows<kTile.rows(), D, kThreads>(q_tile, own.rows, a.d, [&](int r) { return own.q(r); });
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) issue(i, i);

  // The running maximum and sum of a thread's rows, lane / 4 and lane / 4 + 8 of each 16, and the
  // keys that they see. Rows past the end, all of zeros, see what the last does.
  float o[M][D / 8][4] = {}, row_max[M][2], row_sum[M][2];
  int visible[M][2];
#pragma unroll
  for (int i = 0; i < M; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + i * 16 + h * 8 + lane / 4;
      row_max[i][h] = -INFINITY;
      row_sum[i][h] = 0;
      visible[i][h] = !Block::kMasked || r >= own.rows ? own.keys : own.visible(r);
    }
  // What all of the block's rows see, and the last of the warp's.
  const int all_see = Block::kMasked ? own.visible(0) : own.keys;
  int warp_sees = own.keys;
  if constexpr (Block::kMasked) {
    const int last = (own.rows < row + M * 16 ? own.rows : row + M * 16) - 1;
    warp_sees = last < row ? 0 : own.visible(last);
  }
  const float scale = fabsf(a.scale) * kLog2e;
  uint32_t q_fragments[kQInRegisters ? M : 1][kQInRegisters ? TileRow<D>::kSteps : 1][4];
  int stage = 0;
  for (int item = 0; item < items; item += 2) {
    const uint32_t k_tile = wait_and_prefetch(item, stage);
    stage = stage == kStages - 1 ? 0 : stage + 1;
    if constexpr (kQInRegisters) {
      if (item == 0) {
#pragma unroll
        for (int i = 0; i < M; ++i)
#pragma unroll
          for (int step = 0; step < TileRow<D>::kSteps; ++step)
            ptx::ldmatrix_x4(q_fragments[i][step], TileRow<D>::advance(q_lane, i * 16, 2 * step));
      }
    }
    const int key = item / 2 * kTile.step;
    const bool takes_part = !Block::kMasked || key < warp_sees;
    uint32_t p[M][N / 2][4];
    if (takes_part) {
      float s[M][N][4];
      gemm_nt<T, D>(s, k_tile, 0, [&](uint32_t(&x)[4], int i, int step) {
        if constexpr (kQInRegisters) {
#pragma unroll
          for (int e = 0; e < 4; ++e) x[e] = q_fragments[i][step][e];
        } else {
          ptx::ldmatrix_x4(x, TileRow<D>::advance(q_lane, i * 16, 2 * step));
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
      // Only tiles at the end of what rows see are masked.
      const bool masked = all_see - key < kTile.step;
      const auto sees = [&](int i, int j, int e) {
        return key + lane % 4 * 2 + j * 8 + e % 2 < visible[i][e / 2];
      };
      if (masked) {
#pragma unroll
        for (int i = 0; i < M; ++i)
#pragma unroll
          for (int j = 0; j < N; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              if (!sees(i, j, e)) s[i][j][e] = -INFINITY;
      }
#pragma unroll
      for (int i = 0; i < M; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float new_max = s[i][0][2 * h];
#pragma unroll
          for (int j = 0; j < N; ++j)
            new_max = fmaxf(new_max, fmaxf(s[i][j][2 * h], s[i][j][2 * h + 1]));
          new_max = fmaxf(new_max, __shfl_xor_sync(0xFFFFFFFFu, new_max, 1));
          new_max = fmaxf(new_max, __shfl_xor_sync(0xFFFFFFFFu, new_max, 2));
          new_max = fmaxf(row_max[i][h], new_max * scale);
          // If every logit so far is -inf, all probabilities are 0, not exp(-inf + inf).
          const float max_finite = new_max == -INFINITY ? 0.0f : new_max;
          const float rescale = ptx::ex2(row_max[i][h] - max_finite);
          row_max[i][h] = new_max;
          row_sum[i][h] = __fmul_rn(row_sum[i][h], rescale);
#pragma unroll
          for (int j = 0; j < D / 8; ++j) {
            o[i][j][2 * h] *= rescale;
            o[i][j][2 * h + 1] *= rescale;
          }
#pragma unroll
          for (int j = 0; j < N; ++j)
#pragma unroll
            for (int e = 2 * h; e < 2 * h + 2; ++e)
              s[i][j][e] = ptx::ex2(fmaf(s[i][j][e], scale, -max_finite));
        }
      // Masked again for a scale of 0: 0 * -inf is NaN.
      if (masked) {
#pragma unroll
        for (int i = 0; i < M; ++i)
#pragma unroll
          for (int j = 0; j < N; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              if (!sees(i, j, e)) s[i][j][e] = 0;
      }
#pragma unroll
      for (int i = 0; i < M; ++i)
#pragma unroll
        for (int j = 0; j < N; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) row_sum[i][e / 2] += s[i][j][e];
      pack_operand<T>(p, s);
    }
    const uint32_t v_tile = wait_and_prefetch(item + 1, stage);
    if constexpr (Block::kMasked) {
      const int seen_by_all = all_see - key;
      if (seen_by_all < kTile.step && seen_by_all < own.keys - key)
        take_unseen_out<T, D, M, kTile.step, kThreads>(
            memory + (v_tile - q_tile), o,
            [&](int j, int i, int h) { return key + j < visible[i][h]; });
    }
    stage = stage == kStages - 1 ? 0 : stage + 1;
    if (takes_part) gemm_nn<T, D>(o, p, v_tile, 0);
  }

  ptx::cp_async_wait<0>();  // only empty groups are pending
  // A warp's rows of out overwrite its rows of Q, which no other warp reads.
  if (Block::kMasked && items == 0)
    __syncthreads();  // and which other threads may still be loading
  else
    __syncwarp();
#pragma unroll
  for (int i = 0; i < M; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = row_sum[i][h];
      total += __shfl_xor_sync(0xFFFFFFFFu, total, 1);
      total += __shfl_xor_sync(0xFFFFFFFFu, total, 2);
      const int r = row + i * 16 + h * 8 + lane / 4;
      if (lane % 4 == 0 && r < own.rows)
        lse[own.log(r)] = row_max[i][h] * kLn2 + ptx::lg2(total) * kLn2;
      const float inverse = Block::kMasked && visible[i][h] == 0 ? 0.0f : 1.0f / total;
#pragma unroll
      for (int j = 0; j < D / 8; ++j)
        *reinterpret_cast<uint32_t*>(memory + TileRow<D>::offset(r, j) + lane % 4 * 4) =
            ptx::pack2<T>(o[i][j][2 * h] * inverse, o[i][j][2 * h + 1] * inverse);
    }
  __syncwarp();
  const int64_t out_row = int64_t{a.heads} * a.d;
#pragma unroll
  for (int i = lane; i < M * 16 * (D / 8); i += 32) {
    const int r = row + i / (D / 8), c = i % (D / 8);
    if (r < own.rows && c * 8 < a.d)
      *reinterpret_cast<uint4*>(out + own.entry(r, out_row) + c * 8) =
          *reinterpret_cast<const uint4*>(memory + TileRow<D>::offset(r, c));
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
      constexpr MmaTile kTile = single_tile(decltype(large)::value);
      run_mma(call, attention_mma_kernel<SequenceBlock<T>, D, decltype(large)::value>, a.cu_seqlens,
              kTile, single_tile_smem<D>(kTile, kStages), a.out.as<T>(), a.lse.as<float>());
    });
  });
}

template <class T>
void mma_grouped_forward(const GroupedOnDevice<T>& call, const GroupedKeys& keys, const Out& out,
                         const Out& lse) {
  with_mma_tiles(call.problem().d, keys, call.problem().group, [&](auto dim, auto large) {
    constexpr int D = decltype(dim)::value;
    constexpr MmaTile kTile = single_tile(decltype(large)::value);
    run_mma(call, attention_mma_kernel<GroupedBlock<T>, D, decltype(large)::value>, kTile,
            single_tile_smem<D>(kTile, kStages), out.as<T>(), lse.as<float>());
  });
}
template void mma_grouped_forward(const GroupedOnDevice<__half>&, const GroupedKeys&, const Out&,
                                  const Out&);
template void mma_grouped_forward(const GroupedOnDevice<__nv_bfloat16>&, const GroupedKeys&,
                                  const Out&, const Out&);

void mma_grouped_attention(const AttentionArgs& a, Device& device) {
  const AttentionLayout in = attention_layout(a.q, a.k, a.v, a.qkv);
  const GroupedKeys keys(a.keys, a.cu_seqlens);
  with_half_type(in.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const AttentionOnDevice<T> rotated(in, a.cos, a.sin, a.scale, device);
    mma_grouped_forward(GroupedOnDevice<T>(rotated.problem(), in, keys, device), keys, a.out,
                        a.lse);
  });
}

}  // namespace p2r::cuda

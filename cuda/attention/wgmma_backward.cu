// Attention, backward, "wgmma": on Hopper (sm_90a), in two passes and without atomics, so every sum
// has one owner and one order.
//
// A block owns 128 tokens of one sequence and head at a time, with two of their tensors in shared
// memory; the two others are loaded in steps through a ring of two stages, by TMA. Both passes make
// P again from lse:
//
//   keys owned:     S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q    loop over queries
//   queries owned:  S = Q K^T, dP = dO V^T, dQ += dS K                        loop over keys
//
// So P and dS are packed from accumulators straight into the A operands of the next products, and
// nothing but inputs passes through shared memory. That is 7 products and no workspace; without
// `deterministic` a pass of 5 products and a workspace replaces them
// (cuda/attention/wgmma_one_pass.cu). One warp loads, two warpgroups of 64 rows multiply; one's
// exponentials overlap the other's products.
//
// dP - delta is not scaled before it is rounded for the product: dQ and dK are, once, at the end.
// Steps go from the last to the first, so that the ragged one, whose rows beyond the sequence are
// zeroed in shared memory, comes first.
//
// Prediction (no GPU has run this yet; H200, TFLOP/s of the 10 T^2 D H that a backward counts, at
// 8k tokens and more). 128 keys by 128 queries, in clocks of the tensor cores and of the
// exponential unit, both passes together:
//
//   D 64: 3584 / 2048    72: 4288 / 2048    80: 4480 / 2048    128: 7168 / 2048
//
// In the machine code dKV's exponentials all stand where a product is in flight, dQ's 54 of 64 (a
// further 10 are scheduled after the wait). Shared memory is read for less time than the tensor
// cores take, 96 bytes a clock of 128 for S and dP and 64 for the others. FlashAttention-3's
// backward, which has 5 products, keeps the tensor cores busy for half of the time; so do these,
// without its additions in L2, for 350 at 64, 300 at 72, 320 at 80 and 360 at 128. The 515 that
// FlashAttention-3 reaches at 64 in a fixed order would be 76 % of this kernel's ceiling of 676: it
// takes one pass of 5 products whose additions to dQ wait for their turn.
//
// ptxas: attention_d_kv_wgmma_kernel overlaps 100 % of its exponentials
// ptxas: attention_d_q_wgmma_kernel overlaps 84 % of its exponentials
#include "cuda/attention/wgmma_backward.cuh"

namespace p2r::cuda {

using namespace attention_wgmma;

namespace {

// Rows a step, as many as 232 registers a thread hold: S and dP take rows / 2 each until they are
// packed into half of that, the gradients D / 2 each. At 80 columns there are some left to issue
// dV's product before dS is computed.
template <int D>
struct KeysOwned {
  static constexpr int rows = D <= 72 ? 128 : D == 80 ? 96 : 64;
  static constexpr bool dv_before_ds = D == 80;
};
template <int D>
struct QueriesOwned {
  static constexpr int rows = 128;
};

template <class T, int D>
__global__ void __launch_bounds__(Roles<kGroups>::threads, 1)
    attention_d_kv_wgmma_kernel(const __grid_constant__ TensorMap k_map,
                                const __grid_constant__ TensorMap v_map,
                                const __grid_constant__ TensorMap q_map,
                                const __grid_constant__ TensorMap dout_map, WorkList list,
                                const float* lse, const float* delta, T* d_k, T* d_v, int64_t d_row,
                                const float* cos, const float* sin, int64_t tokens, float scale) {
  if constexpr (ptx::on_sm90a) {
    constexpr int N = KeysOwned<D>::rows;
    using Tile = Tiles<D, N>;
    using R = Roles<kGroups>;
    SMEM_DYN(memory);
    SMEM_ARRAY(uint64_t, barrier_storage, Barriers::count);
    SMEM_ARRAY(Work, shared_work, 1);
    SMEM_ARRAY(RowStatistics<N>, statistics, kStages);
    const Barriers barriers(ptx::smem_u32(barrier_storage));
    barriers.init();

    const int group = threadIdx.x / 128;
    if (group == kGroups) {
      ptx::reg_dealloc<R::producer_registers>();
      if (threadIdx.x / 32 == 4 * kGroups)
        load_tiles<D, N>(list, barriers, memory, shared_work, k_map, v_map, q_map, dout_map,
                         statistics, lse, delta, tokens, static_cast<const T*>(nullptr), 0);
    } else {
      ptx::reg_alloc<R::consumer_registers>();
      const float scale_log2 = scale * kLog2e;
      const uint32_t own_k = ptx::smem_u32(memory) + group * 64 * Panels<D>::row_bytes;
      const uint32_t own_v = own_k + Tile::owned_bytes;
      uint32_t step = 0;
      for (int item = 0;; ++item) {
        ptx::mbar_wait(barriers.owned_full, item % 2);
        const Work work = shared_work[0];
        if (work.head < 0) break;
        const uint32_t end = step + (work.length + N - 1) / N;
        float dk[D / 2], dv[D / 2], s[N / 2], dp[N / 2];
        uint32_t p[N / 16][4], ds[N / 16][4];
#pragma unroll
        for (int i = 0; i < D / 2; ++i) dk[i] = dv[i] = 0;

        for (; step != end; ++step) {
          const int stage = barriers.ring.stage(step);
          const uint32_t q =
              ptx::smem_u32(memory) + 2 * Tile::owned_bytes + 2 * stage * Tile::bytes;
          const uint32_t dout = q + Tile::bytes;
          barriers.ring.wait_full(step);
          compute_p_ds<T, D, N, N, KeysOwned<D>::dv_before_ds>(dv, ds, p, s, dp, own_k, q, own_v,
                                                               dout, statistics[stage], scale_log2,
                                                               barriers.ring, step);
          ptx::wgmma_keep(dk);
          keep_operand<N>(ds);
          if constexpr (!KeysOwned<D>::dv_before_ds) {
            ptx::wgmma_keep(dv);
            keep_operand<N>(p);
          }
          ptx::wgmma_fence();
          if constexpr (!KeysOwned<D>::dv_before_ds) gemm_rs<T, D, N>(dv, p, dout);
          gemm_rs<T, D, N>(dk, ds, q);
          ptx::wgmma_commit();
          ptx::wgmma_wait<0>();
          ptx::wgmma_keep(dv);
          ptx::wgmma_keep(dk);
          arrive_warp(barriers.ring.empty_bar(step));
        }
        arrive_warp(barriers.owned_empty);
        store_gradient<T, D>(dv, 1.0f, work, d_v, d_row, nullptr, nullptr);
        store_gradient<T, D>(dk, scale, work, d_k, d_row, cos, sin);
      }
    }
  } else {
    ptx::trap();
  }
}

template <class T, int D>
__global__ void __launch_bounds__(Roles<kGroups>::threads, 1)
    attention_d_q_wgmma_kernel(const __grid_constant__ TensorMap q_map,
                               const __grid_constant__ TensorMap dout_map,
                               const __grid_constant__ TensorMap k_map,
                               const __grid_constant__ TensorMap v_map, WorkList list,
                               const float* lse, const float* delta, T* d_q, int64_t d_row,
                               const float* cos, const float* sin, int64_t tokens, float scale) {
  if constexpr (ptx::on_sm90a) {
    constexpr int N = QueriesOwned<D>::rows;
    using Tile = Tiles<D, N>;
    using R = Roles<kGroups>;
    SMEM_DYN(memory);
    SMEM_ARRAY(uint64_t, barrier_storage, Barriers::count);
    SMEM_ARRAY(Work, shared_work, 1);
    const Barriers barriers(ptx::smem_u32(barrier_storage));
    barriers.init();

    const int group = threadIdx.x / 128, lane = threadIdx.x % 32;
    if (group == kGroups) {
      ptx::reg_dealloc<R::producer_registers>();
      if (threadIdx.x / 32 == 4 * kGroups)
        load_tiles<D, N>(list, barriers, memory, shared_work, q_map, dout_map, k_map, v_map,
                         nullptr, lse, delta, tokens, static_cast<const T*>(nullptr), 0);
    } else {
      ptx::reg_alloc<R::consumer_registers>();
      const float scale_log2 = scale * kLog2e;
      const uint32_t own_q = ptx::smem_u32(memory) + group * 64 * Panels<D>::row_bytes;
      const uint32_t own_dout = own_q + Tile::owned_bytes;
      uint32_t step = 0;
      for (int item = 0;; ++item) {
        ptx::mbar_wait(barriers.owned_full, item % 2);
        const Work work = shared_work[0];
        if (work.head < 0) break;
        const uint32_t first = step, end = step + (work.length + N - 1) / N;
        const int valid = work.length % N;
        float lse_row[2], delta_row[2], dq[D / 2], s[N / 2], dp[N / 2];
        uint32_t ds[N / 16][4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = work.first + threadIdx.x / 32 * 16 + lane / 4 + 8 * h;
          const int64_t at = work.head * tokens + work.begin + row;
          lse_row[h] = row < work.length ? lse[at] * kLog2e : 0.0f;
          delta_row[h] = row < work.length ? delta[at] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < D / 2; ++i) dq[i] = 0;

        for (; step != end; ++step) {
          const uint32_t k = ptx::smem_u32(memory) + 2 * Tile::owned_bytes +
                             2 * barriers.ring.stage(step) * Tile::bytes;
          barriers.ring.wait_full(step);
          issue_scores<T, D, N, N>(s, dp, own_q, k, own_dout, k + Tile::bytes);
#pragma unroll
          for (int i = 0; i < N / 2; ++i) s[i] = ptx::ex2(s[i] * scale_log2 - lse_row[i / 2 % 2]);
          end_basic_block(s, barriers.ring, step);
          ptx::wgmma_wait<0>();
          ptx::wgmma_keep(dp);
#pragma unroll
          for (int i = 0; i < N / 2; ++i) s[i] *= dp[i] - delta_row[i / 2 % 2];
          // Beyond the end P = exp(0 - lse) can be infinite.
          if (valid && step == first) {
#pragma unroll
            for (int i = 0; i < N / 2; ++i)
              if (8 * (i / 4) + 2 * (lane % 4) + i % 2 >= valid) s[i] = 0;
          }
          pack_operand<T, N>(ds, s);
          ptx::wgmma_keep(dq);
          keep_operand<N>(ds);
          ptx::wgmma_fence();
          gemm_rs<T, D, N>(dq, ds, k);
          ptx::wgmma_commit();
          ptx::wgmma_wait<0>();
          ptx::wgmma_keep(dq);
          arrive_warp(barriers.ring.empty_bar(step));
        }
        arrive_warp(barriers.owned_empty);
        store_gradient<T, D>(dq, scale, work, d_q, d_row, cos, sin);
      }
    }
  } else {
    ptx::trap();
  }
}

}  // namespace

void wgmma_attention_backward(const AttentionBackwardArgs& a, Device& device) {
  const AttentionLayout in = attention_layout(a.q, a.k, a.v, a.qkv);
  if (!can_run(a.scale)) return plain_attention_backward(a, device);
  if (in.tokens * in.heads == 0) return;
  if (!a.deterministic) return one_pass_backward(a, device);
  with_half_type(in.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const BackwardOnDevice<T> b(a, device);
    const AttentionProblem<T>& p = b.p;
    const unsigned blocks = b.work.blocks(device);
    with_wgmma_head_dim(in.head_dim, [&](auto dim) {
      constexpr int D = decltype(dim)::value, Q = KeysOwned<D>::rows, K = QueriesOwned<D>::rows;
      launch(attention_d_kv_wgmma_kernel<T, D>, blocks, Roles<kGroups>::threads,
             Tiles<D, Q>::shared, stream_of(device), b.template map<D, kOwned>(p.k, p.qk_row),
             b.template map<D, kOwned>(p.v, p.v_row), b.template map<D, Q>(p.q, p.qk_row),
             b.template dout_map<D, Q>(), b.work.list(), b.lse, b.delta, b.d_k, b.d_v, b.grad.row,
             p.cos, p.sin, in.tokens, p.scale);
      b.work.restart(device);
      launch(attention_d_q_wgmma_kernel<T, D>, blocks, Roles<kGroups>::threads, Tiles<D, K>::shared,
             stream_of(device), b.template map<D, kOwned>(p.q, p.qk_row),
             b.template dout_map<D, kOwned>(), b.template map<D, K>(p.k, p.qk_row),
             b.template map<D, K>(p.v, p.v_row), b.work.list(), b.lse, b.delta, b.d_q, b.grad.row,
             p.cos, p.sin, in.tokens, p.scale);
    });
  });
}

}  // namespace p2r::cuda

// Attention, backward, "wgmma", without `deterministic`: on Hopper (sm_90a), in one pass that
// accumulates dQ in a workspace.
//
// As in the pass that owns keys (cuda/attention/wgmma_backward.cu), a block owns 128 keys of one
// sequence and head, has K and V in shared memory, sums dK and dV in registers, and loops over the
// queries:
//
//   S^T = K Q^T    dP^T = V dO^T    dV += P^T dO    dK += dS^T Q    dQ = dS K
//
// which are 5 products where the two passes have 7, and half of their exponentials. The last needs
// every key's dS, so the two warpgroups store theirs to shared memory in the layout of the
// accumulator, transposed, which wgmma reads as an MN-major operand. Each warpgroup then computes
// the dQ of 64 queries or, where 128 columns leave registers for steps of 64 queries only, half of
// the columns of all of them. That costs one synchronisation of both a step: dV is in flight while
// the other's dS is waited for, and dK while dQ is stored.
//
// dQ is stored through shared memory, where a warp writes its 16 rows and one lane has them added,
// f32, to the workspace by a bulk reduce: one contiguous piece, cut at the sequence's end, so that
// another sequence's rows are never touched. The order of these additions is the one thing that is
// not deterministic. A last kernel scales the sums, rotates them back and rounds them.
//
// Keys of the last tile beyond the sequence: their rows of dS are set to 0, and so are their rows
// of K, which would belong to the next sequence and may be NaN.
//
// Memory: the workspace has 4 T H D bytes. Rotated q and k take none: they are stored in d_qkv,
// where dQ is written only after the pass, and dK by the one block that reads these keys, after it
// has.
//
// Prediction (no GPU has run this yet; H200, TFLOP/s of the 10 T^2 D H that a backward counts, at
// 8k tokens and more). A step of 128 keys by 128 queries (by 64 at 128 columns), in clocks of the
// tensor cores / of shared memory at 128 bytes each, of which storing dQ is a sixth:
//
//   D 64: 2560 / 3080    72: 3010 / 3560    80: 3200 / 3780    128: 2560 / 2940
//
// Of 1024 clocks of exponentials (512 at 128) and 320 of dS = P (dP - delta), those at 64, 72 and
// 80 all stand where a product is in flight: dV's is issued before dP is waited for. That takes
// registers for P both as numbers and as an operand, so S and dP are computed for 64 queries at a
// time, which costs 256 clocks of shared memory at 64 and 72. At 128 registers do not suffice, and
// 18 of 32 exponentials precede the wait. Add to the larger number what kernels of this kind lose
// by synchronising and by what is not overlapped, in all some 1900 (2000 at 128). At 1.75 GHz that
// makes 490 at 64, 500 at 72, 530 at 80 and 490 at 128; a tenth less if the additions in L2 take
// it, and at 72 and 80, whose rows are swizzled as nobody has measured, a fifth less again: 440,
// 360, 380 and 440. The two passes, by the same count, have 3600 to 4500 clocks of the tensor cores
// a step and twice the exponentials: this is 1.2 to 1.25 times as fast.
//
// ptxas: attention_one_pass_wgmma_kernel<64> overlaps 100 % of its exponentials
// ptxas: attention_one_pass_wgmma_kernel<72> overlaps 100 % of its exponentials
// ptxas: attention_one_pass_wgmma_kernel<80> overlaps 100 % of its exponentials
// ptxas: attention_one_pass_wgmma_kernel<128> overlaps 56 % of its exponentials
#include "cuda/attention/wgmma_one_pass.cuh"

namespace p2r::cuda {

using namespace attention_wgmma;

namespace {

// A step's queries, for how many of them S and dP are computed at once, and how many columns of dQ
// a warpgroup computes for 64 of them.
template <int D>
struct OnePass {
  static constexpr int queries = D == 128 ? 64 : 128, queries_at_once = 64;
  static constexpr bool dv_before_ds = D != 128;
  static constexpr int width = D == 128 ? 64 : D, parts = D / width;
  static constexpr int ds_bytes = kOwned * queries * 2, dq_bytes = 64 * width * 4;
  static constexpr int ds_offset = Tiles<D, queries>::shared;
  static constexpr int dq_offset = ds_offset + ds_bytes;
  static constexpr size_t shared = dq_offset + kGroups * dq_bytes;
};

// The workspace is [head][part][token][width]. Its rows are staged in shared memory, where they
// would begin at few different banks: the groups of 8 columns of a row are swizzled, in both.
template <int Width>
__device__ __forceinline__ int swizzled_group(int group, int token) {
  if constexpr (Width % 32 == 0) return group / 4 * 4 + (group % 4 ^ (token & 3));
  if constexpr (Width % 32 == 16) return group / 2 * 2 + (group % 2 ^ (token >> 1 & 1));
  return group;
}

// Adds a warp's 16 rows of dQ, those within the sequence, to the workspace at dq_accum; `row` is
// the first one's index in the sequence.
template <int Width>
__device__ __forceinline__ void reduce_dq(float* staged, const float (&dq)[Width / 2],
                                          float* dq_accum, int row, const Work& work) {
  const int lane = threadIdx.x % 32;
  if (lane == 0) ptx::tma_wait_read<0>();
  __syncwarp();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float* to = staged + (lane / 4 + 8 * h) * Width + 2 * (lane % 4);
    const int token = work.begin + row + lane / 4;
#pragma unroll
    for (int t = 0; t < Width / 8; ++t)
      *reinterpret_cast<float2*>(to + 8 * swizzled_group<Width>(t, token)) =
          make_float2(dq[4 * t + 2 * h], dq[4 * t + 2 * h + 1]);
  }
  ptx::fence_proxy_async();
  __syncwarp();
  const int rows = work.length - row < 16 ? work.length - row : 16;
  if (lane == 0 && rows > 0) {
    ptx::bulk_reduce_add(dq_accum, ptx::smem_u32(staged), rows * Width * 4);
    ptx::tma_commit();
  }
}

template <class T, int D>
__global__ void __launch_bounds__(Roles<kGroups>::threads, 1)
    attention_one_pass_wgmma_kernel(const __grid_constant__ TensorMap k_map,
                                    const __grid_constant__ TensorMap v_map,
                                    const __grid_constant__ TensorMap q_map,
                                    const __grid_constant__ TensorMap dout_map, WorkList list,
                                    const T* k_rows, int64_t k_row, const float* lse,
                                    const float* delta, T* d_k, T* d_v, int64_t d_row,
                                    float* dq_accum, const float* cos, const float* sin,
                                    int64_t tokens, float scale) {
  if constexpr (ptx::on_sm90a) {
    using Pass = OnePass<D>;
    constexpr int N = Pass::queries, Chunk = Pass::queries_at_once, Width = Pass::width;
    using Tile = Tiles<D, N>;
    using R = Roles<kGroups>;
    SMEM_DYN(memory);
    SMEM_ARRAY(uint64_t, barrier_storage, Barriers::count);
    SMEM_ARRAY(Work, shared_work, 1);
    SMEM_ARRAY(RowStatistics<N>, statistics, kStages);
    const Barriers barriers(ptx::smem_u32(barrier_storage));
    barriers.init();

    const int warp = threadIdx.x / 32, group = threadIdx.x / 128, lane = threadIdx.x % 32;
    if (group == kGroups) {
      ptx::reg_dealloc<R::producer_registers>();
      if (warp == 4 * kGroups)
        load_tiles<D, N>(list, barriers, memory, shared_work, k_map, v_map, q_map, dout_map,
                         statistics, lse, delta, tokens, k_rows, k_row);
    } else {
      ptx::reg_alloc<R::consumer_registers>();
      const float scale_log2 = scale * kLog2e;
      const uint32_t k = ptx::smem_u32(memory), own_k = k + group * 64 * Panels<D>::row_bytes;
      const uint32_t own_v = own_k + Tile::owned_bytes;
      // This warpgroup's part of dQ: 64 queries of a step and Width columns.
      const int part = Pass::parts == 1 ? 0 : group, queries = Pass::parts == 1 ? group * 64 : 0;
      const uint32_t ds_tile = k + Pass::ds_offset + queries / 64 * kOwned * 128;
      const uint32_t keys = k + part * kOwned * Panels<D>::row_bytes;
      float* staged = reinterpret_cast<float*>(memory + Pass::dq_offset) + warp * 16 * Width;
      uint32_t step = 0;
      for (int item = 0;; ++item) {
        ptx::mbar_wait(barriers.owned_full, item % 2);
        const Work work = shared_work[0];
        if (work.head < 0) break;
        const uint32_t end = step + (work.length + N - 1) / N;
        float dk[D / 2], dv[D / 2], dq[Width / 2], s[Chunk / 2], dp[Chunk / 2];
        uint32_t p[Chunk / 16][4], ds[N / 16][4];
#pragma unroll
        for (int i = 0; i < D / 2; ++i) dk[i] = dv[i] = 0;

        for (; step != end; ++step) {
          const int stage = barriers.ring.stage(step);
          const uint32_t q = k + 2 * Tile::owned_bytes + 2 * stage * Tile::bytes;
          const uint32_t dout = q + Tile::bytes;
          barriers.ring.wait_full(step);
          compute_p_ds<T, D, N, Chunk, Pass::dv_before_ds>(dv, ds, p, s, dp, own_k, q, own_v, dout,
                                                           statistics[stage], scale_log2,
                                                           barriers.ring, step);
          if (const int inside = work.length - work.first - group * 64; inside < 64)
            zero_rows<N>(ds, inside);
          if constexpr (!Pass::dv_before_ds) {
            ptx::wgmma_keep(dv);
            keep_operand<N>(p);
            ptx::wgmma_fence();
            gemm_rs<T, D, N>(dv, p, dout);
            ptx::wgmma_commit();
          }

          ptx::mbar_wait(barriers.ds_empty, step % 2 ^ 1);
          store_ds<N>(memory + Pass::ds_offset, ds);
          ptx::fence_proxy_async();
          arrive_warp(barriers.ds_full);
          ptx::mbar_wait(barriers.ds_full, step % 2);
          ptx::wgmma_keep(dq);
          ptx::wgmma_keep(dk);
          keep_operand<N>(ds);
          ptx::wgmma_fence();
          gemm_dq<T, D, Width>(dq, ds_tile, keys);
          ptx::wgmma_commit();
          gemm_rs<T, D, N>(dk, ds, q);
          ptx::wgmma_commit();
          ptx::wgmma_wait<1>();
          ptx::wgmma_keep(dv);
          ptx::wgmma_keep(dq);
          arrive_warp(barriers.ds_empty);
          // The first step is the sequence's last.
          const int row = static_cast<int>(end - 1 - step) * N + queries + warp % 4 * 16;
          const int64_t plane = int64_t{work.head} * Pass::parts + part;
          reduce_dq<Width>(staged, dq, dq_accum + (plane * tokens + work.begin + row) * Width, row,
                           work);
          ptx::wgmma_wait<0>();
          ptx::wgmma_keep(dk);
          arrive_warp(barriers.ring.empty_bar(step));
        }
        arrive_warp(barriers.owned_empty);
        store_gradient<T, D>(dv, 1.0f, work, d_v, d_row, nullptr, nullptr);
        store_gradient<T, D>(dk, scale, work, d_k, d_row, cos, sin);
      }
      if (lane == 0) ptx::tma_wait_read<0>();
    }
  } else {
    ptx::trap();
  }
}

constexpr int kBlock = 256;

// Scales the accumulated dQ, rotates it back and rounds it. A thread takes four columns and the
// four that rotary pairs with them.
template <class T, int D>
__global__ void __launch_bounds__(kBlock)
    attention_d_q_convert_kernel(const float* dq_accum, T* d_q, int64_t d_row, const float* cos,
                                 const float* sin, int64_t tokens, int heads, float scale) {
  constexpr int Width = OnePass<D>::width, parts = OnePass<D>::parts, threads = D / 8;
  const int64_t n = tokens * heads * threads;
  for (int64_t i = blockIdx.x * int64_t{kBlock} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * kBlock) {
    const int first = static_cast<int>(i % threads) * 4;
    const int64_t token = i / threads / heads;
    const int head = static_cast<int>(i / threads % heads);
    float x[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int c = first + half * (D / 2), inside = c % Width;
      const int64_t plane = int64_t{head} * parts + c / Width;
      const float4 four = *reinterpret_cast<const float4*>(
          dq_accum + (plane * tokens + token) * Width +
          8 * swizzled_group<Width>(inside / 8, static_cast<int>(token)) + inside % 8);
      x[half][0] = four.x * scale;
      x[half][1] = four.y * scale;
      x[half][2] = four.z * scale;
      x[half][3] = four.w * scale;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float y[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float x0 = x[0][e], x1 = x[1][e];
        const auto entry = [=](int c) { return c < D / 2 ? x0 : x1; };
        y[e] = cos ? rotate_half(entry, cos + token * D, sin + token * D,
                                 first + e + half * (D / 2), D / 2, true)
                   : x[half][e];
      }
      *reinterpret_cast<uint2*>(d_q + token * d_row + int64_t{head} * D + first + half * (D / 2)) =
          make_uint2(ptx::pack2<T>(y[0], y[1]), ptx::pack2<T>(y[2], y[3]));
    }
  }
}

}  // namespace

void attention_wgmma::one_pass_backward(const AttentionBackwardArgs& a, Device& device) {
  const AttentionLayout grad = attention_layout(a.d_q, a.d_k, a.d_v, a.d_qkv);
  const AttentionLayout in = attention_layout(a.q, a.k, a.v, a.qkv);
  const int64_t bytes = attention_workspace(in, static_cast<bool>(a.cos), a.deterministic);
  const Scratch memory = device.scratch(bytes);
  float* dq_accum = memory.as<float>();
  device.zero(dq_accum, bytes);
  with_half_type(in.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const BackwardOnDevice<T> b(a, device, &grad);
    const AttentionProblem<T>& p = b.p;
    with_wgmma_head_dim(in.head_dim, [&](auto dim) {
      constexpr int D = decltype(dim)::value, N = OnePass<D>::queries;
      launch(attention_one_pass_wgmma_kernel<T, D>, b.work.blocks(device), Roles<kGroups>::threads,
             OnePass<D>::shared, stream_of(device), b.template map<D, kOwned>(p.k, p.qk_row),
             b.template map<D, kOwned>(p.v, p.v_row), b.template map<D, N>(p.q, p.qk_row),
             b.template dout_map<D, N>(), b.work.list(), p.k, p.qk_row, b.lse, b.delta, b.d_k,
             b.d_v, b.grad.row, dq_accum, p.cos, p.sin, in.tokens, p.scale);
      launch(attention_d_q_convert_kernel<T, D>, blocks_for(in.tokens * in.heads * (D / 8), kBlock),
             kBlock, 0, stream_of(device), static_cast<const float*>(dq_accum), b.d_q, b.grad.row,
             p.cos, p.sin, in.tokens, static_cast<int>(in.heads), p.scale);
    });
  });
}

}  // namespace p2r::cuda

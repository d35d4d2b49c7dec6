// Attention, forward, "wgmma": on Hopper (sm_90a), for f16 and bf16 of 64, 72, 80 and 128 columns.
//
// Blocks are persistent: each takes tiles of 128 or 192 queries of one sequence and head off a
// list. One warp loads by TMA: the queries once, then K and V in steps, each through a ring of two
// stages. Two or three warpgroups of 64 queries multiply: S = Q K^T from shared memory, then O += P
// V with P in registers, packed from the accumulators of S. The S of a step and the P V of the one
// before are issued together, and the softmax of S runs while P V is in flight; the warpgroups also
// take turns at issuing, so that one's exponentials overlap the others' products.
//
// Steps go from a sequence's last keys to its first: the ragged step comes first, outside of the
// loop, and is the only one that is masked. Its rows of V beyond the sequence are zeroed in shared
// memory, since they are the next sequence's and a NaN there times a probability of 0 is NaN.
// Queries beyond the end are computed and not stored.
//
// The size of a tile is chosen for each call: blocks finish together only if the tiles fill their
// last round. 8192 tokens of 16 heads are 688 tiles of 192 queries, 5.2 rounds of 132
// multiprocessors that take 6, or 1024 of 128, 7.8 of 8: the small ones take 8 * 128 / (6 * 192) =
// 89 % of the time.
//
// Traffic: a tile reads its sequence's K and V once, 4 D bytes a key for 4 D FLOP a query and key,
// so 192 queries make 192 FLOP a byte, and L2, which holds the head that all blocks are at, has to
// give 500e12 / 192 = 2.6 TB/s, or 3.9 for 128 queries. Out and lse are written once, from
// registers.
//
// Prediction (no GPU has run this yet; H200, useful TFLOP/s at 8k tokens and more): a logit costs
// 2 D / 2048 clocks of the tensor cores and 1/16 of the exponential unit, the same at D = 64. One
// after the other they would make half of the peak, 495, less some 5 instructions a logit for
// maximum, sum, rescaling and packing. In the machine code all exponentials of a step stand between
// its S and the wait for P V (below), so that a warpgroup's own products hide them as well as the
// other groups' do: 500 at D = 64, 400 at 72 (the product over d runs 80 long, 5 % more than
// useful, and products 72 wide are the least like what others have measured), 420 at 80, 620 at
// 128, where a product comes with half as many exponentials.
//
// The exponentials of a tile's first step, half of those in the code, have no product to overlap.
// ptxas: attention_wgmma_kernel overlaps 50 % of its exponentials
#include <numbers>

#include "cuda/attention/wgmma.cuh"

namespace p2r::cuda {

using namespace attention_wgmma;

namespace {

// Consumer warpgroups and keys a step. With three, keys are read for half as many queries again as
// with two, but each thread has 160 registers, of which S takes keys / 2, the packed P keys / 4 and
// O D / 2: enough for 128 keys at 64 and 72 columns. With two it has 232. The keys of a step do not
// depend on the number of groups, so neither does a result.
template <int D>
constexpr int kMaxGroups = D <= 72 ? 3 : 2;

template <int D, int Groups>
struct Forward {
  static constexpr int groups = Groups, queries = 64 * groups;
  static constexpr int keys = D == 80 ? 160 : 128;
  static constexpr int stages = 2;
  static constexpr int query_bytes = Panels<D>::bytes(queries), key_bytes = Panels<D>::bytes(keys);
  static constexpr size_t shared = query_bytes + 2 * stages * key_bytes;
};

// Named barriers, one a warpgroup, by which they take turns at issuing; 0 is __syncthreads'.
constexpr int kSchedulerBarrier = 1;
__device__ __forceinline__ void scheduler_barrier_sync(int group) {
  ptx::bar_sync(kSchedulerBarrier + group, 256);
}
__device__ __forceinline__ void scheduler_barrier_arrive(int group, int groups) {
  ptx::bar_arrive(kSchedulerBarrier + (group + 1 == groups ? 0 : group + 1), 256);
}

// The online softmax of a thread's two rows, lane / 4 and 8 below. row_max is the largest score so
// far, unscaled, or with a negative scale the smallest, so that scaling and subtracting the maximum
// are one multiply-add a logit.
struct OnlineSoftmax {
  float row_max[2], row_sum[2] = {0, 0};
  float scale_log2;  // of exponents of 2
  float masked;      // the score of a masked key, whose probability is 0

  __device__ __forceinline__ explicit OnlineSoftmax(float scale) : scale_log2(scale) {
    masked = scale < 0 ? INFINITY : -INFINITY;
    row_max[0] = row_max[1] = masked;
  }

  // Replaces scores by probabilities, up to the division by the final row_sum. What was accumulated
  // before has to be multiplied by `rescale`.
  template <int Count>
  __device__ __forceinline__ void update(float (&s)[Count], float (&rescale)[2]) {
    float new_max[2] = {row_max[0], row_max[1]};
    if (scale_log2 < 0) {
#pragma unroll
      for (int i = 0; i < Count; ++i) new_max[i / 2 % 2] = fminf(new_max[i / 2 % 2], s[i]);
#pragma unroll
      for (int step = 1; step <= 2; step *= 2)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          new_max[h] = fminf(new_max[h], __shfl_xor_sync(0xFFFFFFFFu, new_max[h], step));
    } else {
#pragma unroll
      for (int i = 0; i < Count; ++i) new_max[i / 2 % 2] = fmaxf(new_max[i / 2 % 2], s[i]);
#pragma unroll
      for (int step = 1; step <= 2; step *= 2)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          new_max[h] = fmaxf(new_max[h], __shfl_xor_sync(0xFFFFFFFFu, new_max[h], step));
    }
    float max_finite[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // If every logit so far is -inf, all probabilities are 0, not exp(-inf + inf).
      max_finite[h] = new_max[h] * scale_log2 == -INFINITY ? 0.0f : new_max[h] * scale_log2;
      rescale[h] = ptx::ex2(row_max[h] * scale_log2 - max_finite[h]);
      row_max[h] = new_max[h];
      row_sum[h] *= rescale[h];
    }
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      s[i] = ptx::ex2(s[i] * scale_log2 - max_finite[i / 2 % 2]);
      row_sum[i / 2 % 2] += s[i];
    }
  }
};

template <class T, int D, int Groups>
__global__ void __launch_bounds__(Roles<Groups>::threads, 1)
    attention_wgmma_kernel(const __grid_constant__ TensorMap q_map,
                           const __grid_constant__ TensorMap k_map,
                           const __grid_constant__ TensorMap v_map, WorkList list, T* out,
                           float* lse, int64_t tokens, float scale_log2) {
  if constexpr (ptx::on_sm90a) {
    using F = Forward<D, Groups>;
    using R = Roles<F::groups>;
    constexpr int N = F::keys;
    SMEM_DYN(memory);
    SMEM_ARRAY(uint64_t, barriers, 4 * F::stages + 3);
    SMEM_ARRAY(Work, shared_work, 1);
    const uint32_t q = ptx::smem_u32(memory), k = q + F::query_bytes;
    const uint32_t v = k + F::stages * F::key_bytes;
    const Ring<F::stages> keys(ptx::smem_u32(barriers)), values(keys.full + Ring<F::stages>::bytes);
    const uint32_t q_full = values.full + Ring<F::stages>::bytes, q_empty = q_full + 8;
    const uint32_t v_ragged_full = q_full + 16;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = threadIdx.x / 128;
    if (threadIdx.x == 0) {
      keys.init(4 * F::groups);
      values.init(4 * F::groups);
      ptx::mbar_init(q_full, 1);
      ptx::mbar_init(q_empty, 4 * F::groups);
      ptx::mbar_init(v_ragged_full, 1);
      ptx::mbar_fence_init();
    }
    __syncthreads();
    uint32_t step = 0;  // of both rings, over all tiles

    if (group == F::groups) {
      ptx::reg_dealloc<R::producer_registers>();
      if (warp == 4 * F::groups) {
        int cleared = 0;
        for (int item = 0;; ++item) {
          const Work work = next_work(list);
          wait_warp(q_empty, item % 2 ^ 1);
          if (lane == 0) {
            shared_work[0] = work;
            ptx::mbar_arrive_expect_tx(q_full, work.head < 0 ? 0 : F::query_bytes);
            if (work.head >= 0)
              load_rows<D, F::queries>(q, q_map, q_full, work.head, work.begin + work.first);
          }
          if (work.head < 0) break;
          const int steps = (work.length + N - 1) / N, valid = work.length % N;
          const auto clear_ragged = [&](uint32_t at) {
            ptx::mbar_wait(v_ragged_full, cleared % 2);
            ++cleared;
            clear_rows<D, N>(memory + (v - q) + values.stage(at) * F::key_bytes, valid);
            if (lane == 0) ptx::mbar_arrive(values.full_bar(at));
          };
          for (int n = steps - 1; n >= 0; --n, ++step) {
            const int token = work.begin + n * N, offset = keys.stage(step) * F::key_bytes;
            keys.wait_empty(step);
            if (lane == 0) {
              ptx::mbar_arrive_expect_tx(keys.full_bar(step), F::key_bytes);
              load_rows<D, N>(k + offset, k_map, keys.full_bar(step), work.head, token);
            }
            // Not before the next K is issued: the ragged V is still in flight.
            if (valid && n == steps - 2) clear_ragged(step - 1);
            values.wait_empty(step);
            if (lane == 0) {
              const uint32_t bar = valid && n == steps - 1 ? v_ragged_full : values.full_bar(step);
              ptx::mbar_arrive_expect_tx(bar, F::key_bytes);
              load_rows<D, N>(v + offset, v_map, bar, work.head, token);
            }
          }
          if (valid && steps == 1) clear_ragged(step - 1);
        }
      }
    } else {
      ptx::reg_alloc<R::consumer_registers>();
      if (group == F::groups - 1) scheduler_barrier_arrive(group, F::groups);
      const uint32_t own_q = q + group * 64 * Panels<D>::row_bytes;
      for (int item = 0;; ++item) {
        ptx::mbar_wait(q_full, item % 2);
        const Work work = shared_work[0];
        if (work.head < 0) break;
        const uint32_t last = step + (work.length - 1) / N;
        const int valid = work.length % N;
        OnlineSoftmax softmax(scale_log2);
        float s[N / 2], o[D / 2], rescale[2];
        uint32_t p[N / 16][4];
#pragma unroll
        for (int i = 0; i < D / 2; ++i) o[i] = 0;

        keys.wait_full(step);
        scheduler_barrier_sync(group);
        ptx::wgmma_fence();
        gemm_ss<T, D, F::queries, N>(s, own_q, k + keys.stage(step) * F::key_bytes);
        ptx::wgmma_commit();
        scheduler_barrier_arrive(group, F::groups);
        ptx::wgmma_wait<0>();
        ptx::wgmma_keep(s);
        arrive_warp(keys.empty_bar(step));
        if (step == last) arrive_warp(q_empty);
        if (valid) {
#pragma unroll
          for (int i = 0; i < N / 2; ++i)
            if (8 * (i / 4) + 2 * (lane % 4) + i % 2 >= valid) s[i] = softmax.masked;
        }
        softmax.update(s, rescale);
        pack_operand<T, N>(p, s);

        for (; step < last; ++step) {
          const uint32_t next = step + 1;
          keys.wait_full(next);
          scheduler_barrier_sync(group);
          ptx::wgmma_keep(s);
          ptx::wgmma_fence();
          gemm_ss<T, D, F::queries, N>(s, own_q, k + keys.stage(next) * F::key_bytes);
          ptx::wgmma_commit();
          values.wait_full(step);
          ptx::wgmma_keep(o);
          keep_operand<N>(p);
          ptx::wgmma_fence();
          gemm_rs<T, D, N>(o, p, v + values.stage(step) * F::key_bytes);
          ptx::wgmma_commit();
          scheduler_barrier_arrive(group, F::groups);
          ptx::wgmma_wait<1>();
          ptx::wgmma_keep(s);
          arrive_warp(keys.empty_bar(next));
          softmax.update(s, rescale);
          // Here, although Q is free before the softmax: a branch ends the basic block, and within
          // one ptxas would move the wait above the exponentials.
          ptx::wgmma_keep(s);
          if (next == last) arrive_warp(q_empty);
          ptx::wgmma_wait<0>();
          ptx::wgmma_keep(o);
          arrive_warp(values.empty_bar(step));
          // Only now: the product just waited for read the previous step's P.
          pack_operand<T, N>(p, s);
#pragma unroll
          for (int i = 0; i < D / 2; ++i) o[i] *= rescale[i / 2 % 2];
        }

        values.wait_full(step);
        ptx::wgmma_keep(o);
        keep_operand<N>(p);
        ptx::wgmma_fence();
        gemm_rs<T, D, N>(o, p, v + values.stage(step) * F::key_bytes);
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        ptx::wgmma_keep(o);
        arrive_warp(values.empty_bar(step));
        ++step;

#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float total = softmax.row_sum[h];
          total += __shfl_xor_sync(0xFFFFFFFFu, total, 1);
          total += __shfl_xor_sync(0xFFFFFFFFu, total, 2);
          const int row = work.first + warp * 16 + lane / 4 + 8 * h;
          if (row >= work.length) continue;
          const int64_t token = int64_t{work.begin} + row;
          if (lane % 4 == 0)
            lse[work.head * tokens + token] =
                softmax.row_max[h] * (scale_log2 * kLn2) + logf(total);
          const float inverse = 1 / total;
          T* to = out + (token * list.heads + work.head) * D + 2 * (lane % 4);
#pragma unroll
          for (int c = 0; c < D / 8; ++c)
            *reinterpret_cast<uint32_t*>(to + 8 * c) =
                ptx::pack2<T>(o[4 * c + 2 * h] * inverse, o[4 * c + 2 * h + 1] * inverse);
        }
      }
      if (group == 0) scheduler_barrier_sync(group);
    }
  } else {
    ptx::trap();
  }
}

}  // namespace

void wgmma_attention(const AttentionArgs& a, Device& device) {
  const AttentionLayout in = attention_layout(a.q, a.k, a.v, a.qkv);
  if (!can_run(a.scale)) return plain_attention(a, device);
  with_half_type(in.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const AttentionOnDevice<T> call(in, a.cos, a.sin, a.scale, device);
    const AttentionProblem<T>& p = call.problem();
    with_wgmma_head_dim(in.head_dim, [&](auto dim) {
      constexpr int D = decltype(dim)::value;
      const auto run = [&](auto groups) {
        using F = Forward<D, decltype(groups)::value>;
        const WorkOnDevice work(a.cu_seqlens, F::queries, in.heads, device);
        const unsigned blocks = work.blocks(device);
        if (blocks == 0) return;
        launch(attention_wgmma_kernel<T, D, F::groups>, blocks, Roles<F::groups>::threads,
               F::shared, stream_of(device),
               attention_map<T, D, F::queries>(p.q, p.qk_row, in.tokens, in.heads),
               attention_map<T, D, F::keys>(p.k, p.qk_row, in.tokens, in.heads),
               attention_map<T, D, F::keys>(p.v, p.v_row, in.tokens, in.heads), work.list(),
               a.out.as<T>(), a.lse.as<float>(), in.tokens,
               static_cast<float>(a.scale * std::numbers::log2e));
      };
      if constexpr (kMaxGroups<D> == 3)
        if (!prefers_small_tiles(a.cu_seqlens, 128, 192, in.heads, multiprocessors(device)))
          return run(std::integral_constant<int, 3>());
      run(std::integral_constant<int, 2>());
    });
  });
}

}  // namespace p2r::cuda

// Attention, forward, on Hopper (sm_90a), for f16 and bf16 of 64, 72, 80 and 128 columns.
//
// A block stays on its multiprocessor and takes tiles of 128 or 192 queries of one sequence and
// head off a list. One warp loads by TMA: the queries once, then the keys and values in steps, each
// through a ring of two. Two or three warpgroups of 64 queries multiply: S = Q K^T out of shared
// memory, then O += P V with the weights in registers, which is where S left them. A step's S and
// the last step's P V are issued together, and while the last runs the exponentials of the first
// are taken; the warpgroups also take turns at issuing, so that one's exponentials run beside the
// others' products.
//
// Steps go from a sequence's last keys to its first: the ragged step comes first, outside of the
// loop, and is the only one to mask. Its values beyond the sequence are zeroed in shared memory,
// since they are the next sequence's and a NaN there times a weight of 0 is NaN. Queries beyond
// the end are computed and not stored.
//
// Traffic: a tile reads its sequence's keys and values once, 4 D bytes a key for 4 D FLOP a query
// and key, so 192 queries make 192 FLOP a byte, and L2, which holds the head that all blocks are
// at, has to give 450e12 / 192 = 2.3 TB/s. Out and lse are written once, from registers.
//
// Prediction (no GPU has run this yet; H200, useful TFLOP/s at 8k tokens and more): a logit costs
// 2 D / 2048 clocks of the tensor cores and 1/16 of the exponential unit, the same at D = 64, so
// the two have to overlap wholly for half of the peak. 450 at D = 64, 400 at 72 (the product over d
// runs 80 long, 5 % more than useful), 420 at 80, 600 at 128.
#include "cuda/attention/wgmma.cuh"

namespace p2r::cuda {

using namespace attention_sm90;

namespace {

// Warpgroups and keys a step. With three a tile's keys are read for half as many queries again as
// with two, but each thread has 160 registers, of which S takes keys / 2, the packed weights
// keys / 4 and O D / 2: enough for 128 keys at 64 and 72 columns. With two it has 232.
template <int D>
struct Forward {
  static constexpr int groups = D <= 72 ? 3 : 2, queries = 64 * groups;
  static constexpr int keys = D == 80 ? 160 : 128;
  static constexpr int stages = 2;
  static constexpr int query_bytes = Panels<D>::bytes(queries), key_bytes = Panels<D>::bytes(keys);
  static constexpr size_t shared = query_bytes + 2 * stages * key_bytes;
};

// Named barriers by which the warpgroups take turns at issuing; 0 is __syncthreads'.
constexpr int kTurn = 1;
__device__ __forceinline__ void take_turn(int group) { ptx::bar_sync(kTurn + group, 256); }
__device__ __forceinline__ void pass_turn(int group, int groups) {
  ptx::bar_arrive(kTurn + (group + 1 == groups ? 0 : group + 1), 256);
}

// The running softmax of a thread's two rows, l / 4 and 8 below. `top` is the largest raw product
// so far, or with a negative scale the smallest, so that scaling is one fused step per logit.
struct RunningSoftmax {
  float top[2], sum[2] = {0, 0};
  float scale;  // to powers of 2
  float least;  // the raw product that weighs nothing

  __device__ __forceinline__ explicit RunningSoftmax(float scale_log2) : scale(scale_log2) {
    least = scale < 0 ? INFINITY : -INFINITY;
    top[0] = top[1] = least;
  }

  // Turns products into weights; what was summed up before is to be multiplied by `decay`.
  template <int Count>
  __device__ __forceinline__ void weigh(float (&s)[Count], float (&decay)[2]) {
    float most[2] = {top[0], top[1]};
    if (scale < 0) {
#pragma unroll
      for (int i = 0; i < Count; ++i) most[i / 2 % 2] = fminf(most[i / 2 % 2], s[i]);
#pragma unroll
      for (int step = 1; step <= 2; step *= 2)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          most[h] = fminf(most[h], __shfl_xor_sync(0xFFFFFFFFu, most[h], step));
    } else {
#pragma unroll
      for (int i = 0; i < Count; ++i) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], s[i]);
#pragma unroll
      for (int step = 1; step <= 2; step *= 2)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          most[h] = fmaxf(most[h], __shfl_xor_sync(0xFFFFFFFFu, most[h], step));
    }
    float shift[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // Where every logit so far is -inf, all weights are 0, not exp(-inf + inf).
      shift[h] = most[h] * scale == -INFINITY ? 0.0f : most[h] * scale;
      decay[h] = ptx::ex2(top[h] * scale - shift[h]);
      top[h] = most[h];
      sum[h] *= decay[h];
    }
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      s[i] = ptx::ex2(s[i] * scale - shift[i / 2 % 2]);
      sum[i / 2 % 2] += s[i];
    }
  }
};

template <class T, int D>
__global__ void __launch_bounds__(Roles<Forward<D>::groups>::threads, 1)
    attention_sm90_kernel(const __grid_constant__ TensorMap q_map,
                          const __grid_constant__ TensorMap k_map,
                          const __grid_constant__ TensorMap v_map, WorkList list, T* out,
                          float* lse, int64_t tokens, float scale) {
  if constexpr (ptx::on_sm90a) {
    using F = Forward<D>;
    using R = Roles<F::groups>;
    constexpr int N = F::keys;
    SMEM_DYN(memory);
    SMEM_ARRAY(uint64_t, bars, 4 * F::stages + 3);
    SMEM_ARRAY(Work, shared_work, 1);
    const uint32_t q = ptx::smem_u32(memory), k = q + F::query_bytes;
    const uint32_t v = k + F::stages * F::key_bytes;
    const Ring<F::stages> keys(ptx::smem_u32(bars)), vals(keys.full + Ring<F::stages>::bytes);
    const uint32_t q_full = vals.full + Ring<F::stages>::bytes, q_empty = q_full + 8;
    const uint32_t v_landed = q_full + 16;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = threadIdx.x / 128;
    if (threadIdx.x == 0) {
      keys.init(4 * F::groups);
      vals.init(4 * F::groups);
      ptx::mbar_init(q_full, 1);
      ptx::mbar_init(q_empty, 4 * F::groups);
      ptx::mbar_init(v_landed, 1);
      ptx::mbar_fence_init();
    }
    __syncthreads();
    uint32_t step = 0;  // of the ring, over all work

    if (group == F::groups) {
      ptx::reg_dealloc<R::loader_registers>();
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
          const int steps = (work.length + N - 1) / N, left = work.length % N;
          const auto clear_values = [&](uint32_t at) {
            ptx::mbar_wait(v_landed, cleared % 2);
            ++cleared;
            clear_rows<D, N>(memory + (v - q) + vals.stage(at) * F::key_bytes, left);
            if (lane == 0) ptx::mbar_arrive(vals.full_bar(at));
          };
          for (int n = steps - 1; n >= 0; --n, ++step) {
            const int token = work.begin + n * N, place = keys.stage(step) * F::key_bytes;
            keys.wait_empty(step);
            if (lane == 0) {
              ptx::mbar_arrive_expect_tx(keys.full_bar(step), F::key_bytes);
              load_rows<D, N>(k + place, k_map, keys.full_bar(step), work.head, token);
            }
            // The ragged values are on their way for a while; the next keys went first.
            if (left && n == steps - 2) clear_values(step - 1);
            vals.wait_empty(step);
            if (lane == 0) {
              const uint32_t landed = left && n == steps - 1 ? v_landed : vals.full_bar(step);
              ptx::mbar_arrive_expect_tx(landed, F::key_bytes);
              load_rows<D, N>(v + place, v_map, landed, work.head, token);
            }
          }
          if (left && steps == 1) clear_values(step - 1);
        }
      }
    } else {
      ptx::reg_alloc<R::registers>();
      if (group == F::groups - 1) pass_turn(group, F::groups);
      const uint32_t own_q = q + group * 64 * Panels<D>::row_bytes;
      for (int item = 0;; ++item) {
        ptx::mbar_wait(q_full, item % 2);
        const Work work = shared_work[0];
        if (work.head < 0) break;
        const uint32_t last = step + (work.length - 1) / N;
        const int left = work.length % N;
        RunningSoftmax softmax(scale);
        float s[N / 2], o[D / 2], decay[2];
        uint32_t p[N / 16][4];
#pragma unroll
        for (int i = 0; i < D / 2; ++i) o[i] = 0;

        keys.wait_full(step);
        take_turn(group);
        ptx::wgmma_fence();
        multiply_rows<T, D, F::queries, N>(s, own_q, k + keys.stage(step) * F::key_bytes);
        ptx::wgmma_commit();
        pass_turn(group, F::groups);
        ptx::wgmma_wait<0>();
        ptx::wgmma_keep(s);
        arrive_warp(keys.empty_bar(step));
        if (step == last) arrive_warp(q_empty);
        if (left) {
#pragma unroll
          for (int i = 0; i < N / 2; ++i)
            if (8 * (i / 4) + 2 * (lane % 4) + i % 2 >= left) s[i] = softmax.least;
        }
        softmax.weigh(s, decay);
        pack_weights<T, N>(p, s);

        for (; step < last; ++step) {
          const uint32_t next = step + 1;
          keys.wait_full(next);
          take_turn(group);
          ptx::wgmma_keep(s);
          ptx::wgmma_fence();
          multiply_rows<T, D, F::queries, N>(s, own_q, k + keys.stage(next) * F::key_bytes);
          ptx::wgmma_commit();
          vals.wait_full(step);
          ptx::wgmma_keep(o);
          keep_weights<N>(p);
          ptx::wgmma_fence();
          add_rows<T, D, N>(o, p, v + vals.stage(step) * F::key_bytes);
          ptx::wgmma_commit();
          pass_turn(group, F::groups);
          ptx::wgmma_wait<1>();
          ptx::wgmma_keep(s);
          arrive_warp(keys.empty_bar(next));
          if (next == last) arrive_warp(q_empty);
          softmax.weigh(s, decay);
          ptx::wgmma_wait<0>();
          ptx::wgmma_keep(o);
          arrive_warp(vals.empty_bar(step));
          // Not before: the product just waited for was reading the last step's weights.
          pack_weights<T, N>(p, s);
#pragma unroll
          for (int i = 0; i < D / 2; ++i) o[i] *= decay[i / 2 % 2];
        }

        vals.wait_full(step);
        ptx::wgmma_keep(o);
        keep_weights<N>(p);
        ptx::wgmma_fence();
        add_rows<T, D, N>(o, p, v + vals.stage(step) * F::key_bytes);
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        ptx::wgmma_keep(o);
        arrive_warp(vals.empty_bar(step));
        ++step;

#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float total = softmax.sum[h];
          total += __shfl_xor_sync(0xFFFFFFFFu, total, 1);
          total += __shfl_xor_sync(0xFFFFFFFFu, total, 2);
          const int row = work.first + warp * 16 + lane / 4 + 8 * h;
          if (row >= work.length) continue;
          const int64_t token = int64_t{work.begin} + row;
          if (lane % 4 == 0)
            lse[work.head * tokens + token] = softmax.top[h] * (scale * 0.69314718f) + logf(total);
          const float inverse = 1 / total;
          T* to = out + (token * list.heads + work.head) * D + 2 * (lane % 4);
#pragma unroll
          for (int c = 0; c < D / 8; ++c)
            *reinterpret_cast<uint32_t*>(to + 8 * c) =
                ptx::pack2<T>(o[4 * c + 2 * h] * inverse, o[4 * c + 2 * h + 1] * inverse);
        }
      }
      if (group == 0) take_turn(group);
    }
  } else {
    ptx::trap();
  }
}

}  // namespace

void wgmma_attention(const AttentionArgs& a, Device& device) {
  const AttentionLayout in = attention_layout(a.q, a.k, a.v, a.qkv);
  if (!can_run(in, a.scale)) return plain_attention(a, device);
  with_half_type(in.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const AttentionOnDevice<T> call(in, a.cos, a.sin, a.scale, device);
    const AttentionProblem<T>& p = call.problem();
    attention_sm90::with_head_dim(in.head_dim, [&](auto dim) {
      constexpr int D = decltype(dim)::value;
      using F = Forward<D>;
      const WorkOnDevice work(a.cu_seqlens, F::queries, in.heads, device);
      const unsigned blocks = work.blocks(device);
      if (blocks == 0) return;
      launch(attention_sm90_kernel<T, D>, blocks, Roles<F::groups>::threads, F::shared,
             stream_of(device), attention_map<T, D, F::queries>(p.q, p.qk_row, in.tokens, in.heads),
             attention_map<T, D, F::keys>(p.k, p.qk_row, in.tokens, in.heads),
             attention_map<T, D, F::keys>(p.v, p.v_row, in.tokens, in.heads), work.list(),
             a.out.as<T>(), a.lse.as<float>(), in.tokens,
             static_cast<float>(a.scale * 1.4426950408889634));
    });
  });
}

}  // namespace p2r::cuda

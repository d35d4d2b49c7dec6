// Attention, backward, on Hopper (sm_90a): two passes and no atomics, so every sum has one owner
// and one order.
//
// A block owns 128 tokens of one sequence and head and has two of their tensors in shared memory
// for as long as it takes; the two others come in steps through a ring of two, by TMA. Both passes
// make the weights again from lse:
//
//   keys own:     S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q    walking over queries
//   queries own:  S = Q K^T, dP = dO V^T, dQ += dS K                        walking over keys
//
// So the weights and dS leave the tensor core in the very registers from which it takes them for
// the next product, and nothing but inputs passes through shared memory. That is 7 products where
// a pass that adds up dQ in global memory has 5, and no workspace: at 72 columns, which that pass
// pads to 96, 90 % of its speed by count of products. One warp loads, two warpgroups of 64 rows
// multiply; one's exponentials run beside the other's products.
//
// dP - delta is not scaled before it is rounded for the product: dQ and dK are, once, at the end.
// Steps go from the last to the first, so that the ragged one, whose rows beyond the sequence are
// zeroed in shared memory, comes first.
//
// These passes serve `deterministic: false` too: there is no pass here that adds up dQ in a
// workspace.
//
// Prediction (no GPU has run this yet; H200, TFLOP/s of the 10 T^2 D H that a backward counts, at
// 8k tokens and more): products at 60 % of their peak would make 989 * 0.6 * 5 / 7 = 420, but S and
// dP read both operands from shared memory, for 128 rows a step at 96 bytes a clock of the 128 that
// there are and for 64 at all 128. So 300 at 64, 72 and 80 columns, where the exponentials also
// come twice, and 360 at 128.
#include "cuda/attention_sm90.cuh"

namespace p2r::cuda {

using namespace attention_sm90;

namespace {

constexpr int kGroups = 2, kOwned = 64 * kGroups, kStages = 2;

// Rows a step, as many as 232 registers a thread bear: a step's two squares take rows / 2 each
// until they are packed into half of that, the sums D / 2 each.
template <int D>
struct KeysOwn {
  static constexpr int rows = D <= 72 ? 128 : D == 80 ? 96 : 64;
};
template <int D>
struct QueriesOwn {
  static constexpr int rows = 128;
};

template <int D, int Rows>
struct Tiles {
  static constexpr int owned_bytes = Panels<D>::bytes(kOwned), bytes = Panels<D>::bytes(Rows);
  static constexpr size_t shared = 2 * owned_bytes + 2 * kStages * bytes;
};

struct Bars {
  uint32_t own_full, own_empty, landed;
  Ring<kStages> ring;
  __device__ __forceinline__ explicit Bars(uint32_t at)
      : own_full(at), own_empty(at + 8), landed(at + 16), ring(at + 24) {}
  static constexpr int count = 3 + 2 * kStages;
  __device__ __forceinline__ void init() const {
    if (threadIdx.x == 0) {
      ptx::mbar_init(own_full, 1);
      ptx::mbar_init(own_empty, 4 * kGroups);
      ptx::mbar_init(landed, 1);
      ring.init(4 * kGroups);
      ptx::mbar_fence_init();
    }
    __syncthreads();
  }
};

// lse in powers of 2 and delta of the queries of a step.
template <int Rows>
struct Scalars {
  float lse[Rows], delta[Rows];
};

// The loading warp's work: the tensors a and b of the owned rows, then x and y step by step, with
// the scalars of the queries where it is queries that come in steps.
template <int D, int Rows>
__device__ __forceinline__ void load_all(const WorkList& list, const Bars& bars,
                                         unsigned char* memory, Work* shared_work,
                                         const TensorMap& a, const TensorMap& b, const TensorMap& x,
                                         const TensorMap& y, Scalars<Rows>* scalars,
                                         const float* lse, const float* delta, int64_t tokens) {
  using Tile = Tiles<D, Rows>;
  const int lane = threadIdx.x % 32;
  const uint32_t owned = ptx::smem_u32(memory), steps_at = 2 * Tile::owned_bytes;
  uint32_t step = 0;
  int cleared = 0;
  for (int item = 0;; ++item) {
    const Work work = next_work(list);
    wait_warp(bars.own_empty, item % 2 ^ 1);
    if (lane == 0) {
      *shared_work = work;
      ptx::mbar_arrive_expect_tx(bars.own_full, work.head < 0 ? 0 : 2 * Tile::owned_bytes);
      if (work.head >= 0) {
        const int token = work.begin + work.first;
        load_rows<D, kOwned>(owned, a, bars.own_full, work.head, token);
        load_rows<D, kOwned>(owned + Tile::owned_bytes, b, bars.own_full, work.head, token);
      }
    }
    if (work.head < 0) break;
    const int steps = (work.length + Rows - 1) / Rows, left = work.length % Rows;
    const auto clear = [&](uint32_t at) {
      ptx::mbar_wait(bars.landed, cleared % 2);
      ++cleared;
      unsigned char* tile = memory + steps_at + 2 * bars.ring.stage(at) * Tile::bytes;
      clear_rows<D, Rows>(tile, left);
      clear_rows<D, Rows>(tile + Tile::bytes, left);
      if (lane == 0) ptx::mbar_arrive(bars.ring.full_bar(at));
    };
    for (int n = steps - 1; n >= 0; --n, ++step) {
      const int stage = bars.ring.stage(step);
      bars.ring.wait_empty(step);
      if (scalars) {
        // Beyond the end exp(0 - inf) is a weight of 0.
        const int64_t first = work.head * tokens + work.begin;
        for (int i = lane; i < Rows; i += 32) {
          const bool inside = n * Rows + i < work.length;
          scalars[stage].lse[i] = inside ? lse[first + n * Rows + i] * kLog2E : INFINITY;
          scalars[stage].delta[i] = inside ? delta[first + n * Rows + i] : 0.0f;
        }
        __syncwarp();
      }
      if (lane == 0) {
        const uint32_t bar = left && n == steps - 1 ? bars.landed : bars.ring.full_bar(step);
        const uint32_t tile = owned + steps_at + 2 * stage * Tile::bytes;
        const int token = work.begin + n * Rows;
        ptx::mbar_arrive_expect_tx(bar, 2 * Tile::bytes);
        load_rows<D, Rows>(tile, x, bar, work.head, token);
        load_rows<D, Rows>(tile + Tile::bytes, y, bar, work.head, token);
      }
      // The ragged rows are on their way for a while; the next step's went first.
      if (left && n == steps - 2) clear(step - 1);
    }
    if (left && steps == 1) clear(step - 1);
  }
}

// Entry D / 2 columns away from acc[i], of the same row: in this thread or, where D / 2 is not a
// multiple of 8, two lanes on.
template <int D>
__device__ __forceinline__ float across(const float (&acc)[D / 2], int i) {
  if constexpr (D % 16 == 0) return acc[i < D / 4 ? i + D / 4 : i - D / 4];
  constexpr int middle = D / 16;  // the tile of 8 columns that holds both halves' columns
  const int tile = i / 4;
  // Where lanes 0 and 1 of four find it, and lanes 2 and 3; the giver is of the other pair.
  const int low = tile <= middle ? tile + middle : tile - middle - 1;
  const int high = tile < middle ? tile + middle + 1 : tile - middle;
  const float give = threadIdx.x % 4 >= 2 ? acc[4 * low + i % 4] : acc[4 * high + i % 4];
  return __shfl_xor_sync(0xFFFFFFFFu, give, 2);
}

// Stores a warp's 16 rows times `factor`, those within the sequence, turned back if there are
// tables.
template <class T, int D>
__device__ __forceinline__ void store_sums(float (&acc)[D / 2], float factor, const Work& work,
                                           T* to, int64_t to_row, const float* cos,
                                           const float* sin) {
  const int lane = threadIdx.x % 32, column = 2 * (lane % 4);
#pragma unroll
  for (int i = 0; i < D / 2; ++i) acc[i] *= factor;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = work.first + threadIdx.x / 32 * 16 + lane / 4 + 8 * h;
    const bool inside = row < work.length;
    const int64_t token = int64_t{work.begin} + (inside ? row : work.length - 1);
    T* x = to + token * to_row + int64_t{work.head} * D + column;
#pragma unroll
    for (int t = 0; t < D / 8; ++t) {
      float pair[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int i = 4 * t + 2 * h + e, c = 8 * t + column + e;
        pair[e] = acc[i];
        if (cos) {
          const float far = across<D>(acc, i);
          const bool left = c < D / 2;
          const float s = sin[token * D + (left ? c + D / 2 : c - D / 2)];
          pair[e] = cos[token * D + c] * acc[i] + (left ? s * far : -s * far);
        }
      }
      if (inside) *reinterpret_cast<uint32_t*>(x + 8 * t) = ptx::pack2<T>(pair[0], pair[1]);
    }
  }
}

template <class T, int D>
__global__ void __launch_bounds__(Roles<kGroups>::threads, 1)
    attention_d_kv_sm90_kernel(const __grid_constant__ TensorMap k_map,
                               const __grid_constant__ TensorMap v_map,
                               const __grid_constant__ TensorMap q_map,
                               const __grid_constant__ TensorMap g_map, WorkList list,
                               const float* lse, const float* delta, T* d_k, T* d_v, int64_t d_row,
                               const float* cos, const float* sin, int64_t tokens, float scale) {
  constexpr int N = KeysOwn<D>::rows;
  using Tile = Tiles<D, N>;
  using R = Roles<kGroups>;
  SMEM_DYN(memory);
  SMEM_ARRAY(uint64_t, bar_words, Bars::count);
  SMEM_ARRAY(Work, shared_work, 1);
  SMEM_ARRAY(Scalars<N>, scalars, kStages);
  const Bars bars(ptx::smem_u32(bar_words));
  bars.init();

  const int group = threadIdx.x / 128, lane = threadIdx.x % 32;
  if (group == kGroups) {
    ptx::reg_dealloc<R::loader_registers>();
    if (threadIdx.x / 32 == 4 * kGroups)
      load_all<D, N>(list, bars, memory, shared_work, k_map, v_map, q_map, g_map, scalars, lse,
                     delta, tokens);
  } else {
    ptx::reg_alloc<R::registers>();
    const float scale_log2 = scale * kLog2E;
    const uint32_t own_k = ptx::smem_u32(memory) + group * 64 * Panels<D>::row_bytes;
    const uint32_t own_v = own_k + Tile::owned_bytes;
    uint32_t step = 0;
    for (int item = 0;; ++item) {
      ptx::mbar_wait(bars.own_full, item % 2);
      const Work work = shared_work[0];
      if (work.head < 0) break;
      const uint32_t end = step + (work.length + N - 1) / N;
      float dk[D / 2], dv[D / 2], s[N / 2], ds[N / 2];
      uint32_t p[N / 16][4], w[N / 16][4];
#pragma unroll
      for (int i = 0; i < D / 2; ++i) dk[i] = dv[i] = 0;

      for (; step != end; ++step) {
        const int stage = bars.ring.stage(step);
        const uint32_t q = ptx::smem_u32(memory) + 2 * Tile::owned_bytes + 2 * stage * Tile::bytes;
        const uint32_t g = q + Tile::bytes;
        bars.ring.wait_full(step);
        ptx::wgmma_keep(s);
        ptx::wgmma_keep(ds);
        ptx::wgmma_fence();
        multiply_rows<T, D, kOwned, N>(s, own_k, q);
        ptx::wgmma_commit();
        multiply_rows<T, D, kOwned, N>(ds, own_v, g);
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        ptx::wgmma_keep(s);
        const Scalars<N>& at = scalars[stage];
#pragma unroll
        for (int t = 0; t < N / 8; ++t) {
          const float2 shift = *reinterpret_cast<const float2*>(at.lse + 8 * t + 2 * (lane % 4));
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            s[4 * t + 2 * h] = ptx::ex2(s[4 * t + 2 * h] * scale_log2 - shift.x);
            s[4 * t + 2 * h + 1] = ptx::ex2(s[4 * t + 2 * h + 1] * scale_log2 - shift.y);
          }
        }
        pack_weights<T, N>(p, s);
        ptx::wgmma_wait<0>();
        ptx::wgmma_keep(ds);
#pragma unroll
        for (int t = 0; t < N / 8; ++t) {
          const float2 mean = *reinterpret_cast<const float2*>(at.delta + 8 * t + 2 * (lane % 4));
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            ds[4 * t + 2 * h] = s[4 * t + 2 * h] * (ds[4 * t + 2 * h] - mean.x);
            ds[4 * t + 2 * h + 1] = s[4 * t + 2 * h + 1] * (ds[4 * t + 2 * h + 1] - mean.y);
          }
        }
        pack_weights<T, N>(w, ds);
        ptx::wgmma_keep(dv);
        ptx::wgmma_keep(dk);
        keep_weights<N>(p);
        keep_weights<N>(w);
        ptx::wgmma_fence();
        add_rows<T, D, N>(dv, p, g);
        add_rows<T, D, N>(dk, w, q);
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        ptx::wgmma_keep(dv);
        ptx::wgmma_keep(dk);
        arrive_warp(bars.ring.empty_bar(step));
      }
      arrive_warp(bars.own_empty);
      store_sums<T, D>(dv, 1.0f, work, d_v, d_row, nullptr, nullptr);
      store_sums<T, D>(dk, scale, work, d_k, d_row, cos, sin);
    }
  }
}

template <class T, int D>
__global__ void __launch_bounds__(Roles<kGroups>::threads, 1)
    attention_d_q_sm90_kernel(const __grid_constant__ TensorMap q_map,
                              const __grid_constant__ TensorMap g_map,
                              const __grid_constant__ TensorMap k_map,
                              const __grid_constant__ TensorMap v_map, WorkList list,
                              const float* lse, const float* delta, T* d_q, int64_t d_row,
                              const float* cos, const float* sin, int64_t tokens, float scale) {
  constexpr int N = QueriesOwn<D>::rows;
  using Tile = Tiles<D, N>;
  using R = Roles<kGroups>;
  SMEM_DYN(memory);
  SMEM_ARRAY(uint64_t, bar_words, Bars::count);
  SMEM_ARRAY(Work, shared_work, 1);
  const Bars bars(ptx::smem_u32(bar_words));
  bars.init();

  const int group = threadIdx.x / 128, lane = threadIdx.x % 32;
  if (group == kGroups) {
    ptx::reg_dealloc<R::loader_registers>();
    if (threadIdx.x / 32 == 4 * kGroups)
      load_all<D, N>(list, bars, memory, shared_work, q_map, g_map, k_map, v_map, nullptr, lse,
                     delta, tokens);
  } else {
    ptx::reg_alloc<R::registers>();
    const float scale_log2 = scale * kLog2E;
    const uint32_t own_q = ptx::smem_u32(memory) + group * 64 * Panels<D>::row_bytes;
    const uint32_t own_g = own_q + Tile::owned_bytes;
    uint32_t step = 0;
    for (int item = 0;; ++item) {
      ptx::mbar_wait(bars.own_full, item % 2);
      const Work work = shared_work[0];
      if (work.head < 0) break;
      const uint32_t first = step, end = step + (work.length + N - 1) / N;
      const int left = work.length % N;
      float shift[2], mean[2], dq[D / 2], s[N / 2], ds[N / 2];
      uint32_t w[N / 16][4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = work.first + threadIdx.x / 32 * 16 + lane / 4 + 8 * h;
        const int64_t at = work.head * tokens + work.begin + row;
        shift[h] = row < work.length ? lse[at] * kLog2E : 0.0f;
        mean[h] = row < work.length ? delta[at] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < D / 2; ++i) dq[i] = 0;

      for (; step != end; ++step) {
        const uint32_t k =
            ptx::smem_u32(memory) + 2 * Tile::owned_bytes + 2 * bars.ring.stage(step) * Tile::bytes;
        bars.ring.wait_full(step);
        ptx::wgmma_keep(s);
        ptx::wgmma_keep(ds);
        ptx::wgmma_fence();
        multiply_rows<T, D, kOwned, N>(s, own_q, k);
        ptx::wgmma_commit();
        multiply_rows<T, D, kOwned, N>(ds, own_g, k + Tile::bytes);
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        ptx::wgmma_keep(s);
#pragma unroll
        for (int i = 0; i < N / 2; ++i) s[i] = ptx::ex2(s[i] * scale_log2 - shift[i / 2 % 2]);
        ptx::wgmma_wait<0>();
        ptx::wgmma_keep(ds);
#pragma unroll
        for (int i = 0; i < N / 2; ++i) s[i] *= ds[i] - mean[i / 2 % 2];
        // Beyond the end a weight of exp(0 - lse) can be infinite.
        if (left && step == first) {
#pragma unroll
          for (int i = 0; i < N / 2; ++i)
            if (8 * (i / 4) + 2 * (lane % 4) + i % 2 >= left) s[i] = 0;
        }
        pack_weights<T, N>(w, s);
        ptx::wgmma_keep(dq);
        keep_weights<N>(w);
        ptx::wgmma_fence();
        add_rows<T, D, N>(dq, w, k);
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        ptx::wgmma_keep(dq);
        arrive_warp(bars.ring.empty_bar(step));
      }
      arrive_warp(bars.own_empty);
      store_sums<T, D>(dq, scale, work, d_q, d_row, cos, sin);
    }
  }
}

}  // namespace

void wgmma_attention_backward(const AttentionBackwardArgs& a, Device& device) {
  const AttentionLayout in = attention_layout(a.q, a.k, a.v, a.qkv);
  const AttentionLayout grad = attention_layout(a.d_q, a.d_k, a.d_v, a.d_qkv);
  if (!can_run(in, a.scale) || reinterpret_cast<uintptr_t>(a.d_out.data) % 16)
    return plain_attention_backward(a, device);
  const int64_t rows = in.tokens * in.heads, g_row = in.heads * in.head_dim;
  if (!rows) return;
  const Scratch delta_memory = device.scratch(rows * sizeof(float));
  float* delta = delta_memory.as<float>();
  const float* lse = a.lse.as<const float>();
  const float scale = static_cast<float>(a.scale);
  with_half_type(in.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const T* d_out = a.d_out.as<const T>();
    attention_delta(d_out, a.out.as<const T>(), delta, in, device);
    const AttentionOnDevice<T> call(in, a.cos, a.sin, a.scale, device);
    const AttentionProblem<T>& p = call.problem();
    const WorkOnDevice work(a.cu_seqlens, kOwned, in.heads, device);
    const unsigned blocks = work.blocks(device);
    attention_sm90::with_head_dim(in.head_dim, [&](auto dim) {
      constexpr int D = decltype(dim)::value, Q = KeysOwn<D>::rows, K = QueriesOwn<D>::rows;
      const auto map = [&](const T* x, int64_t row, auto box) {
        return attention_map<T, D, decltype(box)::value>(x, row, in.tokens, in.heads);
      };
      const std::integral_constant<int, kOwned> owned;
      const std::integral_constant<int, Q> queries;
      const std::integral_constant<int, K> keys;
      launch(attention_d_kv_sm90_kernel<T, D>, blocks, Roles<kGroups>::threads, Tiles<D, Q>::shared,
             stream_of(device), map(p.k, p.qk_row, owned), map(p.v, p.v_row, owned),
             map(p.q, p.qk_row, queries), map(d_out, g_row, queries), work.list(), lse, delta,
             reinterpret_cast<T*>(grad.k), reinterpret_cast<T*>(grad.v), grad.row, p.cos, p.sin,
             in.tokens, scale);
      work.restart(device);
      launch(attention_d_q_sm90_kernel<T, D>, blocks, Roles<kGroups>::threads, Tiles<D, K>::shared,
             stream_of(device), map(p.q, p.qk_row, owned), map(d_out, g_row, owned),
             map(p.k, p.qk_row, keys), map(p.v, p.v_row, keys), work.list(), lse, delta,
             reinterpret_cast<T*>(grad.q), grad.row, p.cos, p.sin, in.tokens, scale);
    });
  });
}

}  // namespace p2r::cuda

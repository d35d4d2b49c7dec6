// What the "wgmma" kernels of attention's backward share: the tiles that a block owns and those
// that it loads in steps, P and dS of a step, and the stores of gradients.
#pragma once
#include "cuda/attention/wgmma.cuh"

namespace p2r::cuda::attention_wgmma {

constexpr int kGroups = 2, kOwned = 64 * kGroups, kStages = 2;

template <int D, int Rows>
struct Tiles {
  static constexpr int owned_bytes = Panels<D>::bytes(kOwned), bytes = Panels<D>::bytes(Rows);
  static constexpr size_t shared = 2 * owned_bytes + 2 * kStages * bytes;
};

// owned: the block's own tiles. ragged_full: a step's tiles are loaded, but their rows beyond the
// sequence are not zeroed yet. ds: dS of both warpgroups in shared memory, of the one pass only.
struct Barriers {
  uint32_t owned_full, owned_empty, ragged_full, ds_full, ds_empty;
  Ring<kStages> ring;
  __device__ __forceinline__ explicit Barriers(uint32_t at)
      : owned_full(at),
        owned_empty(at + 8),
        ragged_full(at + 16),
        ds_full(at + 24),
        ds_empty(at + 32),
        ring(at + 40) {}
  static constexpr int count = 5 + 2 * kStages;
  __device__ __forceinline__ void init() const {
    if (threadIdx.x == 0) {
      ptx::mbar_init(owned_full, 1);
      ptx::mbar_init(owned_empty, 4 * kGroups);
      ptx::mbar_init(ragged_full, 1);
      ptx::mbar_init(ds_full, 4 * kGroups);
      ptx::mbar_init(ds_empty, 4 * kGroups);
      ring.init(4 * kGroups);
      ptx::mbar_fence_init();
    }
    __syncthreads();
  }
};

// log2(e) lse and delta of the queries of a step.
template <int Rows>
struct RowStatistics {
  float lse[Rows], delta[Rows];
};

// Copies `inside` rows of a head to an owned tile and zeros the others, into which TMA would load
// rows of the next sequence. A whole warp calls it.
template <int D, class T>
__device__ __forceinline__ void copy_rows(uint32_t tile, const T* x, int64_t row, int inside) {
  using P = Panels<D>;
  constexpr int chunks = P::row_bytes / 16;
#pragma unroll 4
  for (int i = threadIdx.x % 32; i < P::count * kOwned * chunks; i += 32) {
    const int chunk = i % chunks, r = i / chunks % kOwned, panel = i / (chunks * kOwned);
    const int column = panel * P::width + chunk * 8,
              swizzled = chunk ^ r * P::row_bytes / 128 % chunks;
    const bool in_bounds = r < inside && column < D;
    ptx::cp_async16(tile + (panel * kOwned + r) * P::row_bytes + swizzled * 16,
                    in_bounds ? x + r * row + column : x, in_bounds);
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::fence_proxy_async();
  __syncwarp();
}

// The producer warp: the tensors a and b of the owned rows, then x and y step by step, with the
// statistics of the queries where it is queries that are loaded in steps (else null). a_rows, if
// not null, is a in global memory: of its last tile only the rows within the sequence are then
// read.
template <int D, int Rows, class T>
__device__ __forceinline__ void load_tiles(const WorkList& list, const Barriers& barriers,
                                           unsigned char* memory, Work* shared_work,
                                           const TensorMap& a, const TensorMap& b,
                                           const TensorMap& x, const TensorMap& y,
                                           RowStatistics<Rows>* statistics, const float* lse,
                                           const float* delta, int64_t tokens, const T* a_rows,
                                           int64_t a_row) {
  using Tile = Tiles<D, Rows>;
  const int lane = threadIdx.x % 32;
  const uint32_t owned = ptx::smem_u32(memory), steps_offset = 2 * Tile::owned_bytes;
  uint32_t step = 0;
  int cleared = 0;
  for (int item = 0;; ++item) {
    const Work work = next_work(list);
    wait_warp(barriers.owned_empty, item % 2 ^ 1);
    if (work.head < 0) {
      if (lane == 0) {
        *shared_work = work;
        ptx::mbar_arrive(barriers.owned_full);
      }
      break;
    }
    const int token = work.begin + work.first;
    const bool full_tile = !a_rows || work.first + kOwned <= work.length;
    if (lane == 0) {
      *shared_work = work;
      ptx::mbar_expect_tx(barriers.owned_full,
                          full_tile ? 2 * Tile::owned_bytes : Tile::owned_bytes);
      if (full_tile) load_rows<D, kOwned>(owned, a, barriers.owned_full, work.head, token);
      load_rows<D, kOwned>(owned + Tile::owned_bytes, b, barriers.owned_full, work.head, token);
    }
    if (!full_tile)
      copy_rows<D>(owned, a_rows + token * a_row + int64_t{work.head} * D, a_row,
                   work.length - work.first);
    if (lane == 0) ptx::mbar_arrive(barriers.owned_full);
    const int steps = (work.length + Rows - 1) / Rows, valid = work.length % Rows;
    const auto clear = [&](uint32_t at) {
      ptx::mbar_wait(barriers.ragged_full, cleared++ % 2);
      unsigned char* tile = memory + steps_offset + 2 * barriers.ring.stage(at) * Tile::bytes;
      clear_rows<D, Rows>(tile, valid);
      clear_rows<D, Rows>(tile + Tile::bytes, valid);
      if (lane == 0) ptx::mbar_arrive(barriers.ring.full_bar(at));
    };
    for (int n = steps - 1; n >= 0; --n, ++step) {
      const int stage = barriers.ring.stage(step);
      barriers.ring.wait_empty(step);
      if (statistics) {
        // Beyond the end P = exp(0 - inf) = 0.
        const int64_t first = work.head * tokens + work.begin;
        for (int i = lane; i < Rows; i += 32) {
          const bool inside = n * Rows + i < work.length;
          statistics[stage].lse[i] = inside ? lse[first + n * Rows + i] * kLog2e : INFINITY;
          statistics[stage].delta[i] = inside ? delta[first + n * Rows + i] : 0.0f;
        }
        __syncwarp();
      }
      if (lane == 0) {
        const uint32_t full =
            valid && n == steps - 1 ? barriers.ragged_full : barriers.ring.full_bar(step);
        const uint32_t tile = owned + steps_offset + 2 * stage * Tile::bytes;
        const int token = work.begin + n * Rows;
        ptx::mbar_arrive_expect_tx(full, 2 * Tile::bytes);
        load_rows<D, Rows>(tile, x, full, work.head, token);
        load_rows<D, Rows>(tile + Tile::bytes, y, full, work.head, token);
      }
      // Not before the next step's are issued: the ragged tiles are still in flight.
      if (valid && n == steps - 2) clear(step - 1);
    }
    if (valid && steps == 1) clear(step - 1);
  }
}

// s = A X^T and dp = B Y^T for 64 rows of the owned tiles A and B and Chunk rows of a step's N. s
// is complete on return, dp still in flight.
template <class T, int D, int N, int Chunk>
__device__ __forceinline__ void issue_scores(float (&s)[Chunk / 2], float (&dp)[Chunk / 2],
                                             uint32_t a, uint32_t x, uint32_t b, uint32_t y) {
  ptx::wgmma_keep(s);
  ptx::wgmma_keep(dp);
  ptx::wgmma_fence();
  gemm_ss<T, D, kOwned, Chunk, N>(s, a, x);
  ptx::wgmma_commit();
  gemm_ss<T, D, kOwned, Chunk, N>(dp, b, y);
  ptx::wgmma_commit();
  ptx::wgmma_wait<1>();
  ptx::wgmma_keep(s);
}

// ptxas moves instructions within a basic block only, and would move a wgmma wait up, above the
// exponentials that are to run while a product is in flight. This ends the block: `step` is loaded
// already, so it does not wait.
template <int Count>
__device__ __forceinline__ void end_basic_block(float (&s)[Count], const Ring<kStages>& ring,
                                                uint32_t step) {
  ptx::wgmma_keep(s);
  ring.wait_full(step);
}

// P^T and dS^T, both rounded to T, for 64 owned keys and a step of N queries, of which Chunk at a
// time; s and dp are its accumulators. With IssueDv, p is that of a chunk, and dV += P^T dO is
// issued before dP is waited for, so that dS is computed while that product is in flight: it is
// left so. That takes registers for P as numbers and as an operand at once. Without, p is packed as
// those of s and dp become free, and dV is the caller's.
template <class T, int D, int N, int Chunk, bool IssueDv>
__device__ __forceinline__ void compute_p_ds(float (&dv)[D / 2], uint32_t (&ds)[N / 16][4],
                                             uint32_t (&p)[Chunk / 16][4], float (&s)[Chunk / 2],
                                             float (&dp)[Chunk / 2], uint32_t k, uint32_t q,
                                             uint32_t v, uint32_t dout,
                                             const RowStatistics<N>& statistics, float scale_log2,
                                             const Ring<kStages>& ring, uint32_t step) {
  static_assert(IssueDv || Chunk == N);
#pragma unroll
  for (int first = 0; first < N; first += Chunk) {
    const int row = first * Panels<D>::row_bytes;
    const float* lse = statistics.lse + first + 2 * (threadIdx.x % 4);
    const float* delta = statistics.delta + first + 2 * (threadIdx.x % 4);
    issue_scores<T, D, N, Chunk>(s, dp, k, q + row, v, dout + row);
#pragma unroll
    for (int t = 0; t < Chunk / 8; ++t) {
      const float2 lse_pair = *reinterpret_cast<const float2*>(lse + 8 * t);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float* x = s + 4 * t + 2 * h;
        x[0] = ptx::ex2(x[0] * scale_log2 - lse_pair.x);
        x[1] = ptx::ex2(x[1] * scale_log2 - lse_pair.y);
      }
    }
    if constexpr (IssueDv) {
      pack_operand<T, Chunk>(p, s);
      ptx::wgmma_keep(dv);
      keep_operand<Chunk>(p);
      ptx::wgmma_fence();
      gemm_rs<T, D, Chunk, N>(dv, p, dout + row);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
    } else {
      end_basic_block(s, ring, step);
      ptx::wgmma_wait<0>();
    }
    ptx::wgmma_keep(dp);
#pragma unroll
    for (int t = 0; t < Chunk / 8; ++t) {
      const float2 delta_pair = *reinterpret_cast<const float2*>(delta + 8 * t);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float *x = s + 4 * t + 2 * h, *dx = dp + 4 * t + 2 * h;
        if constexpr (!IssueDv) p[t / 2][t % 2 * 2 + h] = ptx::pack2<T>(x[0], x[1]);
        ds[first / 16 + t / 2][t % 2 * 2 + h] =
            ptx::pack2<T>(x[0] * (dx[0] - delta_pair.x), x[1] * (dx[1] - delta_pair.y));
      }
    }
  }
}

// The entry that rotary pairs with acc[i], of the same row and D / 2 columns away: in this thread
// or, where D / 2 is not a multiple of 8, two lanes away.
template <int D>
__device__ __forceinline__ float rotary_partner(const float (&acc)[D / 2], int i) {
  if constexpr (D % 16 == 0) return acc[i < D / 4 ? i + D / 4 : i - D / 4];
  constexpr int middle = D / 16;  // the tile of 8 columns that holds both halves' columns
  const int tile = i / 4;
  // The partner's tile for lanes 0 and 1 of four, and for lanes 2 and 3; the other pair sends it.
  const int low = tile <= middle ? tile + middle : tile - middle - 1;
  const int high = tile < middle ? tile + middle + 1 : tile - middle;
  const float sent = threadIdx.x % 4 >= 2 ? acc[4 * low + i % 4] : acc[4 * high + i % 4];
  return __shfl_xor_sync(0xFFFFFFFFu, sent, 2);
}

// Stores a warp's 16 rows of a gradient times `factor`, those within the sequence, rotated back if
// there are tables.
template <class T, int D>
__device__ __forceinline__ void store_gradient(float (&acc)[D / 2], float factor, const Work& work,
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
          const float partner = rotary_partner<D>(acc, i);
          const bool first_half = c < D / 2;
          const float s = sin[token * D + (first_half ? c + D / 2 : c - D / 2)];
          pair[e] = cos[token * D + c] * acc[i] + (first_half ? s * partner : -s * partner);
        }
      }
      if (inside) *reinterpret_cast<uint32_t*>(x + 8 * t) = ptx::pack2<T>(pair[0], pair[1]);
    }
  }
}

// One call on the device: computes delta, rotates q and k if there are tables (into those of
// `rotated_into`, if given), and lists the owned tiles.
template <class T>
struct BackwardOnDevice {
  const AttentionLayout in, grad;
  const AttentionOnDevice<T> rotated;
  const AttentionProblem<T>& p;
  const Scratch delta_memory;
  const WorkOnDevice work;
  const T* d_out;
  T *d_q, *d_k, *d_v;
  const float* lse;
  float* delta;

  BackwardOnDevice(const AttentionBackwardArgs& a, Device& device,
                   const AttentionLayout* rotated_into = nullptr)
      : in(attention_layout(a.q, a.k, a.v, a.qkv)),
        grad(attention_layout(a.d_q, a.d_k, a.d_v, a.d_qkv)),
        rotated(in, a.cos, a.sin, a.scale, device, rotated_into),
        p(rotated.problem()),
        delta_memory(device, in.tokens * in.heads * sizeof(float)),
        work(a.cu_seqlens, kOwned, in.heads, device),
        d_out(a.d_out.as<const T>()),
        d_q(reinterpret_cast<T*>(grad.q)),
        d_k(reinterpret_cast<T*>(grad.k)),
        d_v(reinterpret_cast<T*>(grad.v)),
        lse(a.lse.as<const float>()),
        delta(delta_memory.as<float>()) {
    attention_delta(d_out, a.out.as<const T>(), delta, in, device);
  }

  template <int D, int Rows>
  TensorMap map(const T* x, int64_t row) const {
    return attention_map<T, D, Rows>(x, row, in.tokens, in.heads);
  }
  template <int D, int Rows>
  TensorMap dout_map() const {
    return map<D, Rows>(d_out, in.heads * in.head_dim);
  }
};

// With a workspace (cuda/attention/wgmma_one_pass.cu), for inputs that TMA can read.
void one_pass_backward(const AttentionBackwardArgs& a, Device& device);

}  // namespace p2r::cuda::attention_wgmma

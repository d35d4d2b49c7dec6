// What Hopper's kernels of attention's backward share: the tiles that a block owns and those that
// come to it in steps, the squares of a step, and the stores of sums.
#pragma once
#include "cuda/attention/wgmma.cuh"

namespace p2r::cuda::attention_sm90 {

constexpr int kGroups = 2, kOwned = 64 * kGroups, kStages = 2;

template <int D, int Rows>
struct Tiles {
  static constexpr int owned_bytes = Panels<D>::bytes(kOwned), bytes = Panels<D>::bytes(Rows);
  static constexpr size_t shared = 2 * owned_bytes + 2 * kStages * bytes;
};

// The last two are the one pass's.
struct Bars {
  uint32_t own_full, own_empty, landed, squares_full, squares_empty;
  Ring<kStages> ring;
  __device__ __forceinline__ explicit Bars(uint32_t at)
      : own_full(at),
        own_empty(at + 8),
        landed(at + 16),
        squares_full(at + 24),
        squares_empty(at + 32),
        ring(at + 40) {}
  static constexpr int count = 5 + 2 * kStages;
  __device__ __forceinline__ void init() const {
    if (threadIdx.x == 0) {
      ptx::mbar_init(own_full, 1);
      ptx::mbar_init(own_empty, 4 * kGroups);
      ptx::mbar_init(landed, 1);
      ptx::mbar_init(squares_full, 4 * kGroups);
      ptx::mbar_init(squares_empty, 4 * kGroups);
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

// Rows of a head to an owned tile: `inside` of them, zeros below, where TMA would read the rows of
// the next sequence. A whole warp calls it.
template <int D, class T>
__device__ __forceinline__ void copy_rows(uint32_t tile, const T* x, int64_t row, int inside) {
  using P = Panels<D>;
  constexpr int chunks = P::row_bytes / 16;
#pragma unroll 4
  for (int i = threadIdx.x % 32; i < P::count * kOwned * chunks; i += 32) {
    const int chunk = i % chunks, r = i / chunks % kOwned, panel = i / (chunks * kOwned);
    const int column = panel * P::width + chunk * 8,
              swizzled = chunk ^ r * P::row_bytes / 128 % chunks;
    const bool there = r < inside && column < D;
    ptx::cp_async16(tile + (panel * kOwned + r) * P::row_bytes + swizzled * 16,
                    there ? x + r * row + column : x, there);
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::fence_proxy_async();
  __syncwarp();
}

// The loading warp's work: the tensors a and b of the owned rows, then x and y step by step, with
// the scalars of the queries where it is queries that come in steps. Where `cut` is given, it is
// where a lies, of which nothing beyond the sequence is to be read.
template <int D, int Rows, class T>
__device__ __forceinline__ void load_all(const WorkList& list, const Bars& bars,
                                         unsigned char* memory, Work* shared_work,
                                         const TensorMap& a, const TensorMap& b, const TensorMap& x,
                                         const TensorMap& y, Scalars<Rows>* scalars,
                                         const float* lse, const float* delta, int64_t tokens,
                                         const T* cut, int64_t cut_row) {
  using Tile = Tiles<D, Rows>;
  const int lane = threadIdx.x % 32;
  const uint32_t owned = ptx::smem_u32(memory), steps_at = 2 * Tile::owned_bytes;
  uint32_t step = 0;
  int cleared = 0;
  for (int item = 0;; ++item) {
    const Work work = next_work(list);
    wait_warp(bars.own_empty, item % 2 ^ 1);
    if (work.head < 0) {
      if (lane == 0) {
        *shared_work = work;
        ptx::mbar_arrive(bars.own_full);
      }
      break;
    }
    const int token = work.begin + work.first;
    const bool whole = !cut || work.first + kOwned <= work.length;
    if (lane == 0) {
      *shared_work = work;
      ptx::mbar_expect_tx(bars.own_full, whole ? 2 * Tile::owned_bytes : Tile::owned_bytes);
      if (whole) load_rows<D, kOwned>(owned, a, bars.own_full, work.head, token);
      load_rows<D, kOwned>(owned + Tile::owned_bytes, b, bars.own_full, work.head, token);
    }
    if (!whole)
      copy_rows<D>(owned, cut + token * cut_row + int64_t{work.head} * D, cut_row,
                   work.length - work.first);
    if (lane == 0) ptx::mbar_arrive(bars.own_full);
    const int steps = (work.length + Rows - 1) / Rows, left = work.length % Rows;
    const auto clear = [&](uint32_t at) {
      ptx::mbar_wait(bars.landed, cleared++ % 2);
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
          scalars[stage].lse[i] = inside ? lse[first + n * Rows + i] * kLog2e : INFINITY;
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

// s = A X^T and ds = B Y^T for 64 rows of the owned tiles A and B and Part rows of a step's N; s is
// there, ds to be waited for.
template <class T, int D, int N, int Part>
__device__ __forceinline__ void start_squares(float (&s)[Part / 2], float (&ds)[Part / 2],
                                              uint32_t a, uint32_t x, uint32_t b, uint32_t y) {
  ptx::wgmma_keep(s);
  ptx::wgmma_keep(ds);
  ptx::wgmma_fence();
  multiply_rows<T, D, kOwned, Part, N>(s, a, x);
  ptx::wgmma_commit();
  multiply_rows<T, D, kOwned, Part, N>(ds, b, y);
  ptx::wgmma_commit();
  ptx::wgmma_wait<1>();
  ptx::wgmma_keep(s);
}

// P^T in p and dS^T in w, both rounded to T, for 64 owned keys and a step of N queries, of which
// Part at a time.
template <class T, int D, int N, int Part>
__device__ __forceinline__ void weigh_queries(uint32_t (&p)[N / 16][4], uint32_t (&w)[N / 16][4],
                                              float (&s)[Part / 2], float (&ds)[Part / 2],
                                              uint32_t k, uint32_t q, uint32_t v, uint32_t g,
                                              const Scalars<N>& at, float scale_log2) {
#pragma unroll
  for (int first = 0; first < N; first += Part) {
    const int row = first * Panels<D>::row_bytes;
    const float* lse = at.lse + first + 2 * (threadIdx.x % 4);
    const float* delta = at.delta + first + 2 * (threadIdx.x % 4);
    start_squares<T, D, N, Part>(s, ds, k, q + row, v, g + row);
#pragma unroll
    for (int t = 0; t < Part / 8; ++t) {
      const float2 shift = *reinterpret_cast<const float2*>(lse + 8 * t);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float* x = s + 4 * t + 2 * h;
        x[0] = ptx::ex2(x[0] * scale_log2 - shift.x);
        x[1] = ptx::ex2(x[1] * scale_log2 - shift.y);
        p[first / 16 + t / 2][t % 2 * 2 + h] = ptx::pack2<T>(x[0], x[1]);
      }
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_keep(ds);
#pragma unroll
    for (int t = 0; t < Part / 8; ++t) {
      const float2 mean = *reinterpret_cast<const float2*>(delta + 8 * t);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float *x = s + 4 * t + 2 * h, *d_p = ds + 4 * t + 2 * h;
        w[first / 16 + t / 2][t % 2 * 2 + h] =
            ptx::pack2<T>(x[0] * (d_p[0] - mean.x), x[1] * (d_p[1] - mean.y));
      }
    }
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

// One call on the device: delta is made, q and k are turned if there are tables (into `room`, if it
// is given), and the owned tiles are listed.
template <class T>
struct BackwardOnDevice {
  const AttentionLayout in, grad;
  const AttentionOnDevice<T> turned;
  const AttentionProblem<T>& p;
  const Scratch delta_memory;
  const WorkOnDevice work;
  const T* d_out;
  T *d_q, *d_k, *d_v;
  const float* lse;
  float* delta;

  BackwardOnDevice(const AttentionBackwardArgs& a, Device& device,
                   const AttentionLayout* room = nullptr)
      : in(attention_layout(a.q, a.k, a.v, a.qkv)),
        grad(attention_layout(a.d_q, a.d_k, a.d_v, a.d_qkv)),
        turned(in, a.cos, a.sin, a.scale, device, room),
        p(turned.problem()),
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

  // Of boxes of Rows tokens.
  template <int D, int Rows>
  TensorMap map(const T* x, int64_t row) const {
    return attention_map<T, D, Rows>(x, row, in.tokens, in.heads);
  }
  template <int D, int Rows>
  TensorMap d_out_map() const {
    return map<D, Rows>(d_out, in.heads * in.head_dim);
  }
};

// With a workspace (cuda/attention/wgmma_one_pass.cu); the inputs are such that TMA can read them.
void one_pass_backward(const AttentionBackwardArgs& a, Device& device);

}  // namespace p2r::cuda::attention_sm90

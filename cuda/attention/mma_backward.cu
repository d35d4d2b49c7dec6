// Attention, backward, "mma": on the tensor cores of sm_80 and later (mma.cuh), in two passes
// without atomics, so every sum has one owner and one order.
//
// Keys: a block owns some keys of one sequence and head, with K and V in shared memory and dK and
// dV in registers, and loops over the queries: tiles of Q and dOut are loaded together, through a
// ring of two stages that cp.async fills, with their lse and delta. It computes the transposes,
// S^T = K Q^T and dP^T = V dOut^T, whose accumulators P^T and dS^T are the A operands of P^T dOut
// and dS^T Q; P never passes through shared memory. Queries: the same with the sides exchanged, for
// dQ = dS K. Both passes make P again from lse, which takes seven products instead of five, but
// neither a workspace nor a fixed order between blocks. delta = rowsum(dOut * out) is computed
// before.
//
// P = 2^(scale log2(e) S - log2(e) lse). A query past the end has lse inf, hence P = 0; a key past
// the end has its dS set to 0. P and dS are rounded to the type for their products.
//
// A gradient is stored through shared memory in f32, where rows can be rotated back before they are
// rounded once.
//
// Why these tiles: registers hold two gradients of 32 rows a warp up to D = 80 (160 of them) if the
// other side is loaded 32 tokens at a time. At D = 128 two of 16 rows take 128, so there 8 warps
// make up the 128 rows: fewer rows would read the other side from L2 too often. dQ is alone and
// keeps 32 rows. The shared memory, of 96 KB at most, suits chips that have 99.
#include "cuda/attention/mma.cuh"

namespace p2r::cuda {

namespace {

constexpr int kStages = 2;

// With 128 threads two blocks fit anyway, but .blocks = 2 makes ptxas (13.0) spill at D = 64.
constexpr MmaTile keys_tile(int d, bool large) {
  if (!large) return {.m = 1, .warps = 4, .step = d > 80 ? 32 : 64, .blocks = 2};
  return d > 72 ? MmaTile{.m = 1, .warps = 8, .step = d > 80 ? 32 : 64, .blocks = 1}
                : MmaTile{.m = 2, .warps = 4, .step = 32, .blocks = 1};
}

constexpr MmaTile queries_tile(int d, bool large) {
  if (!large) return {.m = 1, .warps = 4, .step = d > 80 ? 32 : 64, .blocks = 2};
  return {.m = 2, .warps = 4, .step = 32, .blocks = 2};
}

// The owned tiles of two tensors, and the ring: two tiles a stage.
template <int D>
constexpr size_t backward_smem(const MmaTile& tile) {
  return static_cast<size_t>(2 * tile.rows() + 2 * kStages * tile.step) * TileRow<D>::kBytes;
}
// lse and delta of the keys' pass, behind the tiles.
constexpr size_t statistics_smem(const MmaTile& tile) {
  return sizeof(float) * 2 * kStages * tile.step;
}

// A row of a gradient in f32 in shared memory, padded by 32 bytes against bank conflicts.
template <int D>
constexpr int kStagedRow = D + 8;

// Writes a warp's rows of a gradient, times `factor`, from `row` on. A warp touches only its own
// rows of `staged`.
template <int D, int M, class T>
__device__ __forceinline__ void store_gradient(float* staged, const float (&acc)[M][D / 8][4],
                                               float factor, int row, int rows, T* out,
                                               int64_t stride, int d, const float* cos,
                                               const float* sin) {
  const int lane = threadIdx.x % 32;
  staged += row * kStagedRow<D>;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < M; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int j = 0; j < D / 8; ++j)
        *reinterpret_cast<float2*>(staged + (i * 16 + h * 8 + lane / 4) * kStagedRow<D> + j * 8 +
                                   lane % 4 * 2) =
            make_float2(acc[i][j][2 * h] * factor, acc[i][j][2 * h + 1] * factor);
  __syncwarp();
#pragma unroll 1
  for (int n = lane; n < M * 16 * (D / 8); n += 32) {
    const int r = n / (D / 8), c = n % (D / 8) * 8;
    if (row + r >= rows || c >= d) continue;
    const float* from = staged + r * kStagedRow<D>;
    const int64_t token = row + r;
    float x[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const auto entry = [from](int j) { return from[j]; };
      x[e] = cos ? rotate_half(entry, cos + token * d, sin + token * d, c + e, d / 2, true)
                 : from[c + e];
    }
    store8(out + token * stride + c, x);
  }
}

template <class T, int D, bool Large>
__global__ void __launch_bounds__(keys_tile(D, Large).threads(), keys_tile(D, Large).blocks)
    attention_d_kv_mma_kernel(AttentionProblem<T> a, AttentionGrid grid, const T* d_out,
                              const float* lse, const float* delta, T* d_k, T* d_v, int64_t d_row) {
  constexpr MmaTile kTile = keys_tile(D, Large);
  constexpr int M = kTile.m, N = kTile.step / 8, kThreads = kTile.threads();
  constexpr int kOwnBytes = kTile.rows() * TileRow<D>::kBytes;
  constexpr int kStepBytes = kTile.step * TileRow<D>::kBytes;
  SMEM_DYN(memory);
  const uint32_t k_tile = ptx::smem_u32(memory), v_tile = k_tile + kOwnBytes;
  const uint32_t ring = v_tile + kOwnBytes;
  float* statistics = reinterpret_cast<float*>(memory + backward_smem<D>(kTile));
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * M;
  const BlockTile own = block_tile(a, grid);
  const int length = own.tile.length;
  const int64_t dout_row = int64_t{a.heads} * a.d;
  const T* q = a.q + own.tile.begin * a.qk_row + own.column;
  const T* dout = d_out + own.tile.begin * dout_row + own.column;
  // The first threads of a block load the statistics of a step: lse or delta of one query each.
  const auto load_statistic = [&](int query) {
    const bool is_delta = threadIdx.x >= kTile.step;
    const int at = query + static_cast<int>(threadIdx.x) % kTile.step;
    if (threadIdx.x >= 2 * kTile.step || at >= length) return is_delta ? 0.0f : INFINITY;
    const float value = (is_delta ? delta : lse)[own.head * a.tokens + own.tile.begin + at];
    return is_delta ? value : value * kLog2e;
  };
  const auto issue = [&](int query, int stage) {
    const uint32_t to = ring + stage * 2 * kStepBytes;
    copy_tile<kTile.step, D, kThreads>(to, q + query * a.qk_row, a.qk_row, length - query, a.d);
    copy_tile<kTile.step, D, kThreads>(to + kStepBytes, dout + query * dout_row, dout_row,
                                       length - query, a.d);
    ptx::cp_async_commit();
  };
  const auto store_statistic = [&](float value, int stage) {
    if (threadIdx.x < 2 * kTile.step) statistics[stage * 2 * kTile.step + threadIdx.x] = value;
  };

  copy_tile<kTile.rows(), D, kThreads>(k_tile, a.k + own.token * a.qk_row + own.column, a.qk_row,
                                       own.rows, a.d);
  copy_tile<kTile.rows(), D, kThreads>(v_tile, a.v + own.token * a.v_row + own.column, a.v_row,
                                       own.rows, a.d);
  issue(0, 0);
  store_statistic(load_statistic(0), 0);

  const float scale = a.scale * kLog2e;
  const uint32_t k_lane = ldmatrix_a_lane<D>(k_tile + row * TileRow<D>::kBytes);
  float dk[M][D / 8][4] = {}, dv[M][D / 8][4] = {};
  int stage = 0;
  for (int query = 0; query < length; query += kTile.step) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage is complete, and the other no longer read
    const int after = query + kTile.step;
    const bool more = length - query > kTile.step;
    float next = 0;
    if (more) {
      issue(after, stage ^ 1);
      next = load_statistic(after);
    }
    const uint32_t tiles = ring + stage * 2 * kStepBytes;
    const float* lse_row = statistics + stage * 2 * kTile.step + lane % 4 * 2;
    const float* delta_row = lse_row + kTile.step;

    float s[M][N][4], dp[M][N][4];
    gemm_nt<T, D>(s, tiles, 0, [&](uint32_t(&x)[4], int i, int step) {
      ptx::ldmatrix_x4(x, TileRow<D>::advance(k_lane, i * 16, 2 * step));
    });
    gemm_nt<T, D>(dp, tiles, kTile.step, [&](uint32_t(&x)[4], int i, int step) {
      ptx::ldmatrix_x4(x, TileRow<D>::advance(k_lane, kTile.rows() + i * 16, 2 * step));
    });
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float2 lse_pair = *reinterpret_cast<const float2*>(lse_row + j * 8);
      const float2 delta_pair = *reinterpret_cast<const float2*>(delta_row + j * 8);
#pragma unroll
      for (int i = 0; i < M; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          s[i][j][e] = ptx::ex2(s[i][j][e] * scale - (e % 2 ? lse_pair.y : lse_pair.x));
          dp[i][j][e] = s[i][j][e] * (dp[i][j][e] - (e % 2 ? delta_pair.y : delta_pair.x));
        }
    }
    uint32_t packed[M][N / 2][4];
    pack_operand<T>(packed, s);
    gemm_nn<T, D>(dv, packed, tiles, kTile.step);
    pack_operand<T>(packed, dp);
    gemm_nn<T, D>(dk, packed, tiles, 0);
    if (more) store_statistic(next, stage ^ 1);
    stage ^= 1;
  }

  __syncthreads();  // K and V are no longer read; gradients overwrite them
  const int64_t to = own.token * d_row + own.column, rotary_offset = own.token * a.d;
  float* staged = reinterpret_cast<float*>(memory);
  store_gradient<D>(staged, dk, a.scale, row, own.rows, d_k + to, d_row, a.d,
                    a.cos ? a.cos + rotary_offset : nullptr,
                    a.cos ? a.sin + rotary_offset : nullptr);
  store_gradient<D>(staged, dv, 1.0f, row, own.rows, d_v + to, d_row, a.d, nullptr, nullptr);
}

template <class T, int D, bool Large>
__global__ void __launch_bounds__(queries_tile(D, Large).threads(), queries_tile(D, Large).blocks)
    attention_d_q_mma_kernel(AttentionProblem<T> a, AttentionGrid grid, const T* d_out,
                             const float* lse, const float* delta, T* d_q, int64_t d_row) {
  constexpr MmaTile kTile = queries_tile(D, Large);
  constexpr int M = kTile.m, N = kTile.step / 8, kThreads = kTile.threads();
  constexpr int kOwnBytes = kTile.rows() * TileRow<D>::kBytes;
  constexpr int kStepBytes = kTile.step * TileRow<D>::kBytes;
  SMEM_DYN(memory);
  const uint32_t q_tile = ptx::smem_u32(memory), dout_tile = q_tile + kOwnBytes;
  const uint32_t ring = dout_tile + kOwnBytes;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * M;
  const BlockTile own = block_tile(a, grid);
  const int length = own.tile.length;
  const int64_t dout_row = int64_t{a.heads} * a.d;
  const T* k = a.k + own.tile.begin * a.qk_row + own.column;
  const T* v = a.v + own.tile.begin * a.v_row + own.column;
  const auto issue = [&](int key, int stage) {
    const uint32_t to = ring + stage * 2 * kStepBytes;
    copy_tile<kTile.step, D, kThreads>(to, k + key * a.qk_row, a.qk_row, length - key, a.d);
    copy_tile<kTile.step, D, kThreads>(to + kStepBytes, v + key * a.v_row, a.v_row, length - key,
                                       a.d);
    ptx::cp_async_commit();
  };

  copy_tile<kTile.rows(), D, kThreads>(q_tile, a.q + own.token * a.qk_row + own.column, a.qk_row,
                                       own.rows, a.d);
  copy_tile<kTile.rows(), D, kThreads>(dout_tile, d_out + own.token * dout_row + own.column,
                                       dout_row, own.rows, a.d);
  issue(0, 0);
  float lse_row[M][2], delta_row[M][2];
#pragma unroll
  for (int i = 0; i < M; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + i * 16 + h * 8 + lane / 4;
      const int64_t at = own.head * a.tokens + own.token + r;
      lse_row[i][h] = r < own.rows ? lse[at] * kLog2e : 0.0f;
      delta_row[i][h] = r < own.rows ? delta[at] : 0.0f;
    }

  const float scale = a.scale * kLog2e;
  const uint32_t q_lane = ldmatrix_a_lane<D>(q_tile + row * TileRow<D>::kBytes);
  float dq[M][D / 8][4] = {};
  int stage = 0;
  for (int key = 0; key < length; key += kTile.step) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage is complete, and the other no longer read
    if (length - key > kTile.step) issue(key + kTile.step, stage ^ 1);
    const uint32_t tiles = ring + stage * 2 * kStepBytes;
    stage ^= 1;

    float s[M][N][4], dp[M][N][4];
    gemm_nt<T, D>(s, tiles, 0, [&](uint32_t(&x)[4], int i, int step) {
      ptx::ldmatrix_x4(x, TileRow<D>::advance(q_lane, i * 16, 2 * step));
    });
    gemm_nt<T, D>(dp, tiles, kTile.step, [&](uint32_t(&x)[4], int i, int step) {
      ptx::ldmatrix_x4(x, TileRow<D>::advance(q_lane, kTile.rows() + i * 16, 2 * step));
    });
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
      for (int j = 0; j < N; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          dp[i][j][e] = ptx::ex2(s[i][j][e] * scale - lse_row[i][e / 2]) *
                        (dp[i][j][e] - delta_row[i][e / 2]);
    if (length - key < kTile.step) {
      const int valid = length - key - lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < M; ++i)
#pragma unroll
        for (int j = 0; j < N; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (j * 8 + e % 2 >= valid) dp[i][j][e] = 0;
    }
    uint32_t packed[M][N / 2][4];
    pack_operand<T>(packed, dp);
    gemm_nn<T, D>(dq, packed, tiles, 0);
  }

  __syncthreads();  // Q and dOut are no longer read; the gradient overwrites them
  const int64_t rotary_offset = own.token * a.d;
  store_gradient<D>(reinterpret_cast<float*>(memory), dq, a.scale, row, own.rows,
                    d_q + own.token * d_row + own.column, d_row, a.d,
                    a.cos ? a.cos + rotary_offset : nullptr,
                    a.cos ? a.sin + rotary_offset : nullptr);
}

}  // namespace

void mma_attention_backward(const AttentionBackwardArgs& a, Device& device) {
  const AttentionLayout in = attention_layout(a.q, a.k, a.v, a.qkv);
  const AttentionLayout grad = attention_layout(a.d_q, a.d_k, a.d_v, a.d_qkv);
  const Scratch delta_memory = device.scratch(in.tokens * in.heads * sizeof(float));
  float* delta = delta_memory.as<float>();
  const float* lse = a.lse.as<const float>();
  with_half_type(in.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const T* d_out = a.d_out.as<const T>();
    attention_delta(d_out, a.out.as<const T>(), delta, in, device);
    const AttentionOnDevice<T> call(in, a.cos, a.sin, a.scale, device);
    with_mma_tiles(in.head_dim, a.cu_seqlens, [&](auto dim, auto large) {
      constexpr int D = decltype(dim)::value;
      constexpr bool kLarge = decltype(large)::value;
      constexpr MmaTile kKeys = keys_tile(D, kLarge), kQueries = queries_tile(D, kLarge);
      static_assert(kStagedRow<D> * sizeof(float) * kKeys.rows() <= backward_smem<D>(kKeys));
      static_assert(kStagedRow<D> * sizeof(float) * kQueries.rows() <= backward_smem<D>(kQueries));
      run_mma(call, attention_d_kv_mma_kernel<T, D, kLarge>, a.cu_seqlens, kKeys,
              backward_smem<D>(kKeys) + statistics_smem(kKeys), d_out, lse, delta,
              reinterpret_cast<T*>(grad.k), reinterpret_cast<T*>(grad.v), grad.row);
      run_mma(call, attention_d_q_mma_kernel<T, D, kLarge>, a.cu_seqlens, kQueries,
              backward_smem<D>(kQueries), d_out, lse, delta, reinterpret_cast<T*>(grad.q),
              grad.row);
    });
  });
}

}  // namespace p2r::cuda

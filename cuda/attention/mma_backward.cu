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
// Rows are those of the forward pass: with grouped heads, a query has one for each head of a key
// head. A block that owns keys takes the rows that see them, from the first on, sequence after
// sequence where several share the keys: so the sum over heads and readers has one owner and one
// order. Tiles at the end of what rows see are masked, others are not.
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
// lse, delta and, with masks, how many of the owned keys are seen: of the keys' pass, behind the
// tiles.
constexpr size_t statistics_smem(const MmaTile& tile, bool masked) {
  return sizeof(float) * (masked ? 3 : 2) * kStages * tile.step;
}

// A row of a gradient in f32 in shared memory, padded by 32 bytes against bank conflicts.
template <int D>
constexpr int kStagedRow = D + 8;

// Writes a warp's rows of a gradient, times `factor`, from `row` on, to the entries place(r) of
// out. With tables, a row is rotated back by the angles of token(r). A warp touches only its own
// rows of `staged`.
template <int D, int M, class T, class Place, class Token>
__device__ __forceinline__ void store_gradient(float* staged, const float (&acc)[M][D / 8][4],
                                               float factor, int row, int rows, T* out,
                                               const Place& place, int d, const float* cos,
                                               const float* sin, const Token& token) {
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
    const int64_t angles = cos ? token(row + r) * d : 0;
    float x[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const auto entry = [from](int j) { return from[j]; };
      x[e] = cos ? rotate_half(entry, cos + angles, sin + angles, c + e, d / 2, true) : from[c + e];
    }
    store8(out + place(row + r) + c, x);
  }
}

// What a block that owns keys sees: `length` of them, and a cursor over the rows that see them.
// Here, keys of a whole sequence, which all of its rows see.
template <class T>
struct SequenceKeysBlock {
  using Element = T;
  using Problem = AttentionProblem<T>;
  static constexpr bool kMasked = false;  // whether some rows see only some of the keys
  const Problem& a;
  const BlockTile own;
  int length, row = 0;

  __device__ __forceinline__ SequenceKeysBlock(const Problem& problem, const AttentionGrid& grid,
                                               int)
      : a(problem), own(block_tile(problem, grid)), length(own.rows) {}
  // Elements of an owned key in a tensor with `row` elements a token, and its token.
  __device__ __forceinline__ int64_t key(int r, int64_t row) const {
    return (own.token + r) * row + own.column;
  }
  __device__ __forceinline__ int64_t token(int r) const { return own.token + r; }
  __device__ __forceinline__ int64_t q_row() const { return a.qk_row; }
  __device__ __forceinline__ int64_t k_row() const { return a.qk_row; }
  // Rows from the cursor to the end of their sequence; 0 after the last sequence.
  __device__ __forceinline__ int left() const { return own.tile.length - row; }
  __device__ __forceinline__ void advance(int step) { row += step; }
  // Where rows of a tensor with `stride` elements a token are, from the cursor on.
  __device__ __forceinline__ auto rows(const T* x, int64_t stride) const {
    const T* from = x + (own.tile.begin + row) * stride + own.column;
    return [=](int r) { return from + r * stride; };
  }
  __device__ __forceinline__ int64_t log(int r) const {
    return own.head * a.tokens + own.tile.begin + row + r;
  }
  __device__ __forceinline__ int seen(int) const { return length; }
};

// The same with any of AttentionKeys and grouped heads.
template <class T>
struct GroupedKeysBlock {
  using Element = T;
  using Problem = GroupedProblem<T>;
  static constexpr bool kMasked = true;
  const Problem& a;
  KeyTile tile;
  int head, step, length, reader = 0, row = 0, key_of_first = 0;
  GroupedSequence s{};

  __device__ __forceinline__ GroupedKeysBlock(const Problem& problem, const AttentionGrid& grid,
                                              int rows_at_once)
      : a(problem), step(rows_at_once) {
    const int64_t index = grid.first + blockIdx.x;
    tile = a.key_tiles[index / a.key_heads];
    head = static_cast<int>(index % a.key_heads);
    length = tile.length;
    open();
  }
  __device__ __forceinline__ int64_t key(int r, int64_t row) const {
    return (tile.row + r) * row + static_cast<int64_t>(head) * a.d;
  }
  __device__ __forceinline__ int64_t token(int r) const { return tile.row + r; }
  __device__ __forceinline__ int64_t q_row() const { return a.q_row; }
  __device__ __forceinline__ int64_t k_row() const { return a.k_row; }
  __device__ __forceinline__ int left() const {
    return reader < tile.readers ? s.queries * a.group - row : 0;
  }
  __device__ __forceinline__ void advance(int by) {
    row += by;
    if (left() > 0) return;
    ++reader;
    open();
  }
  __device__ __forceinline__ auto rows(const T* x, int64_t stride) const {
    return [=, this](int r) { return x + a.row(s, row + r, head, stride); };
  }
  __device__ __forceinline__ int64_t log(int r) const { return a.log(s, row + r, head); }
  // Of the owned keys, those that a row sees.
  __device__ __forceinline__ int seen(int r) const { return a.visible(s, row + r) - key_of_first; }

 private:
  // Moves to the first rows of the current reader that see the keys, or of the next that has some.
  __device__ __forceinline__ void open() {
    for (; reader < tile.readers; ++reader) {
      const KeyReader r = a.readers[tile.first_reader + reader];
      s = a.sequences[r.sequence];
      key_of_first = r.key;
      row = s.first_query(r.key, a.causal) * a.group / step * step;
      if (row < s.queries * a.group) return;
    }
  }
};

template <class Block, int D, bool Large>
__global__ void __launch_bounds__(keys_tile(D, Large).threads(), keys_tile(D, Large).blocks)
    attention_d_kv_mma_kernel(typename Block::Problem a, AttentionGrid grid,
                              const typename Block::Element* d_out, const float* lse,
                              const float* delta, typename Block::Element* d_k,
                              typename Block::Element* d_v, int64_t d_row) {
  using T = typename Block::Element;
  constexpr MmaTile kTile = keys_tile(D, Large);
  constexpr int M = kTile.m, N = kTile.step / 8, kThreads = kTile.threads();
  constexpr int kOwnBytes = kTile.rows() * TileRow<D>::kBytes;
  constexpr int kStepBytes = kTile.step * TileRow<D>::kBytes;
  SMEM_DYN(memory);
  const uint32_t k_tile = ptx::smem_u32(memory), v_tile = k_tile + kOwnBytes;
  const uint32_t ring = v_tile + kOwnBytes;
  float* statistics = reinterpret_cast<float*>(memory + backward_smem<D>(kTile));
  int* seen = reinterpret_cast<int*>(statistics + 2 * kStages * kTile.step);  // if it is kMasked
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * M;
  Block own(a, grid, kTile.step);
  const int64_t dout_row = int64_t{a.heads} * a.d;
  // The first threads of a block load the statistics of a step: lse or delta of one row each.
  const auto load_statistic = [&] {
    const bool is_delta = threadIdx.x >= kTile.step;
    const int at = static_cast<int>(threadIdx.x) % kTile.step;
    if (threadIdx.x >= 2 * kTile.step || at >= own.left()) return is_delta ? 0.0f : INFINITY;
    const float value = (is_delta ? delta : lse)[own.log(at)];
    return is_delta ? value : value * kLog2e;
  };
  // Starts loading the cursor's rows. Returns whether one of them does not see all owned keys, of
  // which the first sees least.
  const auto issue = [&](int stage) {
    const uint32_t to = ring + stage * 2 * kStepBytes;
    copy_rows<kTile.step, D, kThreads>(to, own.left(), a.d, own.rows(a.q, own.q_row()));
    copy_rows<kTile.step, D, kThreads>(to + kStepBytes, own.left(), a.d, own.rows(d_out, dout_row));
    ptx::cp_async_commit();
    if constexpr (Block::kMasked) {
      if (threadIdx.x < kTile.step)
        seen[stage * kTile.step + threadIdx.x] = own.seen(static_cast<int>(threadIdx.x));
      return own.seen(0) < own.length;
    }
    return false;
  };
  const auto store_statistic = [&](float value, int stage) {
    if (threadIdx.x < 2 * kTile.step) statistics[stage * 2 * kTile.step + threadIdx.x] = value;
  };

  copy_rows<kTile.rows(), D, kThreads>(k_tile, own.length, a.d,
                                       [&](int r) { return a.k + own.key(r, own.k_row()); });
  copy_rows<kTile.rows(), D, kThreads>(v_tile, own.length, a.d,
                                       [&](int r) { return a.v + own.key(r, a.v_row); });
  bool more = own.left() > 0, masked = false;
  if (more) {
    masked = issue(0);
    store_statistic(load_statistic(), 0);
  }

  const float scale = a.scale * kLog2e;
  const uint32_t k_lane = ldmatrix_a_lane<D>(k_tile + row * TileRow<D>::kBytes);
  float dk[M][D / 8][4] = {}, dv[M][D / 8][4] = {};
  int stage = 0;
  while (more) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage is complete, and the other no longer read
    own.advance(kTile.step);
    more = own.left() > 0;
    const bool mask = masked;
    float next = 0;
    if (more) {
      masked = issue(stage ^ 1);
      next = load_statistic();
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
    if (mask) {
      const int* seen_row = seen + stage * kTile.step + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < N; ++j)
#pragma unroll
        for (int i = 0; i < M; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (row + i * 16 + e / 2 * 8 + lane / 4 >= seen_row[j * 8 + e % 2])
              s[i][j][e] = dp[i][j][e] = 0;
    }
    uint32_t packed[M][N / 2][4];
    pack_operand<T>(packed, s);
    gemm_nn<T, D>(dv, packed, tiles, kTile.step);
    pack_operand<T>(packed, dp);
    gemm_nn<T, D>(dk, packed, tiles, 0);
    if (more) store_statistic(next, stage ^ 1);
    stage ^= 1;
  }

  ptx::cp_async_commit();  // without rows, K and V are still being loaded
  ptx::cp_async_wait<0>();
  __syncthreads();  // K and V are no longer read; gradients overwrite them
  float* staged = reinterpret_cast<float*>(memory);
  const auto place = [&](int r) { return own.key(r, d_row); };
  const auto token = [&](int r) { return own.token(r); };
  store_gradient<D>(staged, dk, a.scale, row, own.length, d_k, place, a.d, a.cos, a.sin, token);
  store_gradient<D>(staged, dv, 1.0f, row, own.length, d_v, place, a.d, nullptr, nullptr, token);
}

template <class Block, int D, bool Large>
__global__ void __launch_bounds__(queries_tile(D, Large).threads(), queries_tile(D, Large).blocks)
    attention_d_q_mma_kernel(typename Block::Problem a, AttentionGrid grid,
                             const typename Block::Element* d_out, const float* lse,
                             const float* delta, typename Block::Element* d_q, int64_t d_row) {
  using T = typename Block::Element;
  constexpr MmaTile kTile = queries_tile(D, Large);
  constexpr int M = kTile.m, N = kTile.step / 8, kThreads = kTile.threads();
  constexpr int kOwnBytes = kTile.rows() * TileRow<D>::kBytes;
  constexpr int kStepBytes = kTile.step * TileRow<D>::kBytes;
  SMEM_DYN(memory);
  const uint32_t q_tile = ptx::smem_u32(memory), dout_tile = q_tile + kOwnBytes;
  const uint32_t ring = dout_tile + kOwnBytes;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * M;
  const Block own(a, grid, kTile.rows());
  const int64_t dout_row = int64_t{a.heads} * a.d;
  const auto issue = [&](int key, int stage) {
    const uint32_t to = ring + stage * 2 * kStepBytes;
    copy_rows<kTile.step, D, kThreads>(to, own.keys - key, a.d, own.key_rows(false, key));
    copy_rows<kTile.step, D, kThreads>(to + kStepBytes, own.keys - key, a.d,
                                       own.key_rows(true, key));
    ptx::cp_async_commit();
  };

  copy_rows<kTile.rows(), D, kThreads>(q_tile, own.rows, a.d, [&](int r) { return own.q(r); });
  copy_rows<kTile.rows(), D, kThreads>(dout_tile, own.rows, a.d,
                                       [&](int r) { return d_out + own.entry(r, dout_row); });
  if (own.keys > 0) issue(0, 0);
  // Rows past the end see what the last does, and have no gradient.
  float lse_row[M][2], delta_row[M][2];
  int visible[M][2];
#pragma unroll
  for (int i = 0; i < M; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + i * 16 + h * 8 + lane / 4;
      lse_row[i][h] = r < own.rows ? lse[own.log(r)] * kLog2e : 0.0f;
      delta_row[i][h] = r < own.rows ? delta[own.log(r)] : 0.0f;
      visible[i][h] = !Block::kMasked || r >= own.rows ? own.keys : own.visible(r);
    }
  const int all_see = Block::kMasked ? own.visible(0) : own.keys;

  const float scale = a.scale * kLog2e;
  const uint32_t q_lane = ldmatrix_a_lane<D>(q_tile + row * TileRow<D>::kBytes);
  float dq[M][D / 8][4] = {};
  int stage = 0;
  for (int key = 0; key < own.keys; key += kTile.step) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage is complete, and the other no longer read
    if (own.keys - key > kTile.step) issue(key + kTile.step, stage ^ 1);
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
    if (all_see - key < kTile.step) {
#pragma unroll
      for (int i = 0; i < M; ++i)
#pragma unroll
        for (int j = 0; j < N; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (key + lane % 4 * 2 + j * 8 + e % 2 >= visible[i][e / 2]) dp[i][j][e] = 0;
    }
    uint32_t packed[M][N / 2][4];
    pack_operand<T>(packed, dp);
    gemm_nn<T, D>(dq, packed, tiles, 0);
  }

  ptx::cp_async_commit();  // without keys, Q and dOut are still being loaded
  ptx::cp_async_wait<0>();
  __syncthreads();  // Q and dOut are no longer read; the gradient overwrites them
  store_gradient<D>(
      reinterpret_cast<float*>(memory), dq, a.scale, row, own.rows, d_q,
      [&](int r) { return own.entry(r, d_row); }, a.d, a.cos, a.sin,
      [&](int r) { return own.token(r); });
}

// Runs both kernels by run(kernel, tile, bytes of shared memory, arguments...).
template <template <class> class Keys, template <class> class Queries, class T, int D, bool Large,
          class Run, class RunKeys>
void run_backward(const AttentionBackwardArgs& a, const float* delta, const RunKeys& run_keys,
                  const Run& run_queries) {
  constexpr MmaTile kKeys = keys_tile(D, Large), kQueries = queries_tile(D, Large);
  static_assert(kStagedRow<D> * sizeof(float) * kKeys.rows() <= backward_smem<D>(kKeys));
  static_assert(kStagedRow<D> * sizeof(float) * kQueries.rows() <= backward_smem<D>(kQueries));
  const AttentionLayout grad = attention_layout(a.d_q, a.d_k, a.d_v, a.d_qkv);
  const T* d_out = a.d_out.as<const T>();
  const float* lse = a.lse.as<const float>();
  run_keys(attention_d_kv_mma_kernel<Keys<T>, D, Large>, kKeys,
           backward_smem<D>(kKeys) + statistics_smem(kKeys, Keys<T>::kMasked), d_out, lse, delta,
           reinterpret_cast<T*>(grad.k), reinterpret_cast<T*>(grad.v), grad.key_row);
  run_queries(attention_d_q_mma_kernel<Queries<T>, D, Large>, kQueries, backward_smem<D>(kQueries),
              d_out, lse, delta, reinterpret_cast<T*>(grad.q), grad.row);
}

}  // namespace

void mma_attention_backward(const AttentionBackwardArgs& a, Device& device) {
  const AttentionLayout in = attention_layout(a.q, a.k, a.v, a.qkv);
  const Scratch delta_memory = device.scratch(in.tokens * in.heads * sizeof(float));
  float* delta = delta_memory.as<float>();
  with_half_type(in.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    attention_delta(a.d_out.as<const T>(), a.out.as<const T>(), delta, in, device);
    const AttentionOnDevice<T> call(in, a.cos, a.sin, a.scale, device);
    with_mma_tiles(in.head_dim, a.cu_seqlens, [&](auto dim, auto large) {
      const auto run = [&](auto kernel, const MmaTile& tile, size_t smem, auto... rest) {
        run_mma(call, kernel, a.cu_seqlens, tile, smem, rest...);
      };
      run_backward<SequenceKeysBlock, SequenceBlock, T, decltype(dim)::value,
                   decltype(large)::value>(a, delta, run, run);
    });
  });
}

void mma_grouped_attention_backward(const AttentionBackwardArgs& a, Device& device) {
  const AttentionLayout in = attention_layout(a.q, a.k, a.v, a.qkv);
  const GroupedKeys keys(a.keys, a.cu_seqlens);
  const Scratch delta_memory = device.scratch(in.tokens * in.heads * sizeof(float));
  float* delta = delta_memory.as<float>();
  with_half_type(in.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    attention_delta(a.d_out.as<const T>(), a.out.as<const T>(), delta, in, device);
    const AttentionOnDevice<T> rotated(in, a.cos, a.sin, a.scale, device);
    const GroupedOnDevice<T> call(rotated.problem(), in, keys, device);
    with_mma_tiles(in.head_dim, keys, in.group(), [&](auto dim, auto large) {
      run_backward<GroupedKeysBlock, GroupedBlock, T, decltype(dim)::value, decltype(large)::value>(
          a, delta,
          [&](auto kernel, const MmaTile& tile, size_t smem, auto... rest) {
            call.with_key_tiles(in.key_tokens, tile.rows(),
                                [&](const GroupedProblem<T>& problem, int64_t tiles) {
                                  launch_tiles(kernel, problem, {0, tiles, true}, problem.key_heads,
                                               tile, smem, device, rest...);
                                });
          },
          [&](auto kernel, const MmaTile& tile, size_t smem, auto... rest) {
            run_mma(call, kernel, tile, smem, rest...);
          });
    });
  });
}

}  // namespace p2r::cuda

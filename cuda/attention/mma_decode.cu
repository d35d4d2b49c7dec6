// Cached attention of sequences with few new tokens, "mma" (mma.cuh): decoding. There are not
// enough rows to fill a chip with blocks of them, so the keys are divided: a block owns 256 keys of
// a sequence and key head and at most 16 rows (the query heads of that key head, of each new
// token), one mma tile. Its four warps take turns at steps of 16 keys, each with a running maximum,
// sum and output of its own and a ring of its own, so that no warp waits for another until the end.
// There the warps' parts are merged in shared memory, in order; a second kernel merges the parts of
// a sequence's blocks, in order. Where a part begins depends on the number of the key in its
// sequence alone, and a part without keys adds exact zeros: so a row's bits depend on its query and
// the keys that it sees, not on what else is in the call.
//
// Traffic: keys and values once, 4 D bytes a key, in steps of 8 KB a warp at D = 128, of which two
// are in flight, 64 KB a multiprocessor; H200 needs some 29 KB (4.8 TB/s, 132 of them, 0.8 us). The
// addresses of all of a warp's keys are looked up in the page table at once, before the first load.
// Parts are 4 D bytes a row and block: for two rows of 128, 1 KB beside the 128 KB of the keys.
//
// Why 256 keys: one sequence of 4096 tokens with 8 key heads is 128 blocks, a chip's round; more
// keys a block would leave multiprocessors idle there, fewer would pay a block's start, some 1.5 us
// of dependent loads, more often than the two blocks that fit hide it.
//
// Prediction, H200 (no GPU has run this yet): 16 heads of 128 on 8 key heads, 8 sequences of 4096
// tokens: 134 MB at 75 % of 4.8 TB/s, 37 us, and 3 us for the merge. One sequence: 17 MB in one
// round of blocks that have two starts' latency and 128 KB each at some 60 GB/s, 5 us.
#include "cuda/attention/mma.cuh"

namespace p2r::cuda {

namespace {

constexpr int kRows = 16, kWarps = 4, kThreads = 32 * kWarps;
constexpr int kStep = 16, kSteps = 4;            // keys of a warp at a time, and how often
constexpr int kChunk = kStep * kSteps * kWarps;  // keys of a block
constexpr int kStages = 3;
// New tokens times query heads of a key head up to which a sequence is decoded. Two tiles: above,
// those of the forward kernel are filled well enough.
constexpr int kMostRows = 2 * kRows;

template <int D>
constexpr int kStageBytes = 2 * kStep* TileRow<D>::kBytes;
template <int D>
constexpr size_t kSharedBytes = static_cast<size_t>(kWarps) * kStages* kStageBytes<D>;

// A block's rows and keys; its part of the result, or -1 if it has all keys.
struct KeyChunk {
  int32_t sequence, first, chunk, part;
};
// Rows of a sequence whose result is that of several parts.
struct PartedRows {
  int32_t sequence, first, part, parts;
};

// Softmax over some keys without the division: values are relative to 2^max.
struct Part {
  float max, sum;
};

// What the parts 0 .. n - 1 of a value amount to, in order.
template <class Of, class Value>
__device__ __forceinline__ Part merge(int n, const Of& part, const Value& value_of, float& value) {
  Part all{-INFINITY, 0};
  for (int i = 0; i < n; ++i) all.max = fmaxf(all.max, part(i).max);
  // If every logit is -inf, all probabilities are 0, not exp(-inf + inf).
  const float max_finite = all.max == -INFINITY ? 0.0f : all.max;
  value = 0;
  for (int i = 0; i < n; ++i) {
    const Part p = part(i);
    const float weight = ptx::ex2(p.max - max_finite);
    all.sum = fmaf(p.sum, weight, all.sum);
    value = fmaf(value_of(i), weight, value);
  }
  return all;
}

// Writes entry c of a row, and with c = 0 its lse.
template <class T>
__device__ __forceinline__ void finish(const GroupedProblem<T>& a, const GroupedSequence& s, int r,
                                       int head, int c, const Part& all, float value, T* out,
                                       float* lse) {
  if (c < a.d)
    out[a.row(s, r, head, int64_t{a.heads} * a.d) + c] = from_float<T>(value * (1.0f / all.sum));
  if (c == 0) lse[a.log(s, r, head)] = all.max * kLn2 + ptx::lg2(all.sum) * kLn2;
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 2)
    cached_attention_mma_kernel(GroupedProblem<T> a, const KeyChunk* chunks, int part_rows, T* out,
                                float* lse, Part* parts, float* values) {
  SMEM_DYN(memory);
  SMEM_ARRAY(Part, warp_parts, kWarps * kRows);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const KeyChunk chunk = chunks[blockIdx.x / a.key_heads];
  const int head = static_cast<int>(blockIdx.x % a.key_heads);
  const GroupedSequence s = a.sequences[chunk.sequence];
  const int left = s.queries * a.group - chunk.first, rows = left < kRows ? left : kRows;
  const int first_key = chunk.chunk * kChunk;
  const int seen_by_last = a.visible(s, chunk.first + rows - 1);
  const int all_see = a.visible(s, chunk.first);
  unsigned char* ring = memory + warp * kStages * kStageBytes<D>;
  const uint32_t ring_address = ptx::smem_u32(ring);

  // Step n of the warp begins at this key. Lanes 0 to 15 look up a key of each step.
  const auto key_of = [&](int n) { return first_key + (n * kWarps + warp) * kStep; };
  int64_t places[kSteps];
#pragma unroll
  for (int n = 0; n < kSteps; ++n) {
    const int key = key_of(n) + lane % kStep;
    places[n] = key < seen_by_last ? a.key(s, key, a.k_row) : 0;
  }
  const T *k = a.k + head * a.key_head, *v = a.v + head * a.key_head;
  const auto issue = [&](int n) {
    const uint32_t to = ring_address + n % kStages * kStageBytes<D>;
    constexpr int kChunks = TileRow<D>::kChunks, kDown = 32 / kChunks;
    static_assert(kDown * kChunks == 32);
#pragma unroll
    for (int i = 0; i < kStep; i += kDown) {
      const int r = i + lane / kChunks, c = lane % kChunks;
      const int64_t place = __shfl_sync(0xFFFFFFFFu, places[n], r) + (c * 8 < a.d ? c * 8 : 0);
      const bool inside = key_of(n) + r < seen_by_last && c * 8 < a.d;
      const int at = TileRow<D>::offset(r, c);
      ptx::cp_async16(to + at, k + place, inside);
      ptx::cp_async16(to + kStep * TileRow<D>::kBytes + at, v + place, inside);
    }
  };
#pragma unroll
  for (int n = 0; n < kStages - 1; ++n) {
    if (key_of(n) < seen_by_last) issue(n);
    ptx::cp_async_commit();
  }

  uint32_t q[TileRow<D>::kSteps][4];
  int visible[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = lane / 4 + 8 * h;
    visible[h] = r < rows ? a.visible(s, chunk.first + r) : seen_by_last;
    const T* row = a.q + a.row(s, chunk.first + (r < rows ? r : 0), head, a.q_row);
#pragma unroll
    for (int step = 0; step < TileRow<D>::kSteps; ++step)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = step * 16 + half * 8 + lane % 4 * 2;
        q[step][2 * half + h] =
            r < rows && c < a.d ? *reinterpret_cast<const uint32_t*>(row + c) : 0;
      }
  }

  const float scale = fabsf(a.scale) * kLog2e, sign = a.scale < 0 ? -1.0f : 1.0f;
  float o[1][D / 8][4] = {}, row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0, 0};
#pragma unroll
  for (int n = 0; n < kSteps; ++n) {
    const int key = key_of(n);
    ptx::cp_async_wait<kStages - 2>();
    __syncwarp();  // this stage is complete, and the one before no longer read
    if (n + kStages - 1 < kSteps && key_of(n + kStages - 1) < seen_by_last)
      issue(n + kStages - 1 < kSteps ? n + kStages - 1 : n);
    ptx::cp_async_commit();
    if (key >= seen_by_last) continue;
    const int stage = n % kStages * kStageBytes<D>;
    float logits[1][2][4];
    gemm_nt<T, D>(logits, ring_address + stage, 0, [&](uint32_t(&x)[4], int, int step) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] = q[step][e];
    });
    const auto sees = [&](int j, int h) { return key + j < visible[h]; };
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float new_max = -INFINITY;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& x = logits[0][j / 2][2 * h + j % 2];
        x = sees(lane % 4 * 2 + j / 2 * 8 + j % 2, h) ? x * sign : -INFINITY;
        new_max = fmaxf(new_max, x);
      }
      new_max = fmaxf(new_max, __shfl_xor_sync(0xFFFFFFFFu, new_max, 1));
      new_max = fmaxf(new_max, __shfl_xor_sync(0xFFFFFFFFu, new_max, 2));
      new_max = fmaxf(row_max[h], new_max * scale);
      const float max_finite = new_max == -INFINITY ? 0.0f : new_max;
      const float rescale = ptx::ex2(row_max[h] - max_finite);
      row_max[h] = new_max;
      row_sum[h] = __fmul_rn(row_sum[h], rescale);
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        o[0][j][2 * h] *= rescale;
        o[0][j][2 * h + 1] *= rescale;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& x = logits[0][j / 2][2 * h + j % 2];
        // Masked again for a scale of 0: 0 * -inf is NaN.
        x = sees(lane % 4 * 2 + j / 2 * 8 + j % 2, h) ? ptx::ex2(fmaf(x, scale, -max_finite))
                                                      : 0.0f;
        row_sum[h] += x;
      }
    }
    if (all_see < key + kStep && all_see < seen_by_last)
      take_unseen_out<T, D, 1, kStep, 32>(ring + stage + kStep * TileRow<D>::kBytes, o,
                                          [&](int j, int, int h) { return sees(j, h); });
    uint32_t p[1][1][4];
    pack_operand<T>(p, logits);
    gemm_nn<T, D>(o, p, ring_address + stage, kStep);
  }

  // The warps' parts: outputs over their own rings, [16][D].
  ptx::cp_async_wait<0>();
  __syncwarp();
  float* own = reinterpret_cast<float*>(ring);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float total = row_sum[h];
    total += __shfl_xor_sync(0xFFFFFFFFu, total, 1);
    total += __shfl_xor_sync(0xFFFFFFFFu, total, 2);
    const int r = lane / 4 + 8 * h;
    if (lane % 4 == 0) warp_parts[warp * kRows + r] = {row_max[h], total};
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
      *reinterpret_cast<float2*>(own + r * D + j * 8 + lane % 4 * 2) =
          make_float2(o[0][j][2 * h], o[0][j][2 * h + 1]);
  }
  __syncthreads();
  const float* all = reinterpret_cast<const float*>(memory);
  constexpr int kWarpFloats = kStages * kStageBytes<D> / 4;
  static_assert(kRows * D <= kWarpFloats);
  for (int i = threadIdx.x; i < rows * D; i += kThreads) {
    const int r = i / D, c = i % D;
    float value;
    const Part merged = merge(
        kWarps, [&](int w) { return warp_parts[w * kRows + r]; },
        [&](int w) { return all[w * kWarpFloats + r * D + c]; }, value);
    if (chunk.part < 0) {
      finish(a, s, chunk.first + r, head, c, merged, value, out, lse);
    } else {
      const int64_t at = (static_cast<int64_t>(chunk.part) * a.key_heads + head) * part_rows + r;
      values[at * D + c] = value;
      if (c == 0) parts[at] = merged;
    }
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads)
    merge_parts_kernel(GroupedProblem<T> a, const PartedRows* parted, int part_rows, T* out,
                       float* lse, const Part* parts, const float* values) {
  const PartedRows own = parted[blockIdx.x / a.key_heads];
  const int head = static_cast<int>(blockIdx.x % a.key_heads);
  const GroupedSequence s = a.sequences[own.sequence];
  const int left = s.queries * a.group - own.first, rows = left < kRows ? left : kRows;
  for (int i = threadIdx.x; i < rows * D; i += kThreads) {
    const int r = i / D, c = i % D;
    const auto at = [&](int part) {
      return (static_cast<int64_t>(own.part + part) * a.key_heads + head) * part_rows + r;
    };
    float value;
    const Part merged = merge(
        own.parts, [&](int part) { return parts[at(part)]; },
        [&](int part) { return values[at(part) * D + c]; }, value);
    finish(a, s, own.first + r, head, c, merged, value, out, lse);
  }
}

template <class T>
void decode(const GroupedOnDevice<T>& call, const GroupedKeys& keys, T* out, float* lse) {
  Device& device = call.device();
  GroupedProblem<T> p = call.problem();
  std::vector<KeyChunk> chunks;
  std::vector<PartedRows> parted;
  int32_t parts = 0, part_rows = 0;
  for (size_t i = 0; i < keys.sequences.size(); ++i) {
    const GroupedSequence& s = keys.sequences[i];
    const int32_t sequence = static_cast<int32_t>(i), rows = s.queries * p.group;
    for (int32_t first = 0; first < rows; first += kRows) {
      const int32_t last = std::min(first + kRows, rows) - 1;
      const int32_t n =
          static_cast<int32_t>(ceil_div(s.visible(last / p.group, keys.causal), kChunk));
      if (n > 1) {
        parted.push_back({sequence, first, parts, n});
        part_rows = std::max(part_rows, last - first + 1);
      }
      for (int32_t c = 0; c < n; ++c) chunks.push_back({sequence, first, c, n > 1 ? parts++ : -1});
    }
  }
  if (chunks.empty() || !p.key_heads) return;
  with_head_dim<64, 128>(p.d, [&](auto dim) {
    constexpr int D = decltype(dim)::value;
    const KeyChunk* on_device = nullptr;
    const PartedRows* parted_rows = nullptr;
    Part* part_sums = nullptr;
    float* values = nullptr;
    const int64_t part_count = int64_t{parts} * p.key_heads * part_rows;
    const ScratchWorkspace scratch(device, [&](Workspace& w) {
      p.sequences = upload(device, w, keys.sequences);
      p.tables = upload(device, w, keys.tables);
      on_device = upload(device, w, chunks);
      parted_rows = upload(device, w, parted);
      part_sums = w.take<Part>(part_count);
      values = w.take<float>(part_count * D);
    });
    const auto blocks = [&](size_t n) {
      return static_cast<unsigned>(n * static_cast<size_t>(p.key_heads));
    };
    launch(cached_attention_mma_kernel<T, D>, blocks(chunks.size()), kThreads, kSharedBytes<D>,
           stream_of(device), p, on_device, part_rows, out, lse, part_sums, values);
    if (parted.empty()) return;
    launch(merge_parts_kernel<T, D>, blocks(parted.size()), kThreads, 0, stream_of(device), p,
           parted_rows, part_rows, out, lse, static_cast<const Part*>(part_sums),
           static_cast<const float*>(values));
  });
}

}  // namespace

void mma_cached_attention(const CachedAttentionArgs& a, Device& device) {
  const GroupedKeys keys(a);
  GroupedKeys few = keys, many = keys;
  const int64_t group = a.q.shape[1] / a.k.shape[1];
  const auto is_few = [&](const GroupedSequence& s) { return s.queries * group <= kMostRows; };
  std::erase_if(few.sequences, [&](const GroupedSequence& s) { return !is_few(s); });
  std::erase_if(many.sequences, is_few);
  with_half_type(a.q.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    decode(GroupedOnDevice<T>(a, few, device), few, a.out.as<T>(), a.lse.as<float>());
    mma_grouped_forward(GroupedOnDevice<T>(a, many, device), many, a.out, a.lse);
  });
}

}  // namespace p2r::cuda

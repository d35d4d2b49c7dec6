// Attention of rows (grouped.cuh), backward, "plain" (plain.cuh): two passes and no atomics, as in
// plain_backward.cu. The kernel of dK and dV owns a tile of rows of k and v that the same sequences
// see, and loops over the rows of each of them in order, so that a shared key's gradient has one
// owner; the kernel of dQ owns rows and loops over the keys that the last of them sees.
//
// f32 on the CUDA cores: seven products of 4096 causal tokens of 16 heads of 128, 240 GFLOP of
// useful work, take 9 ms at some 30 TFLOP/s of an H200's 67.
#include "cuda/attention/grouped.cuh"
#include "cuda/attention/plain.cuh"

namespace p2r::cuda {

namespace {

constexpr int kStep = 32, kStepRows = kStep / kSide;

// Rows that a block owns.
template <int Dim>
constexpr int kOwned = Dim > 80 ? 32 : 64;

// A sequence that sees a tile of keys, whose first is its logical key `key`.
struct Reader {
  int32_t sequence, key;
};
// Rows of k and v, and readers first_reader .. first_reader + readers - 1.
struct KeyTile {
  int32_t row, length, first_reader, readers;
};

template <class T, int Dim>
__global__ void __launch_bounds__(kThreads, Dim > 80 ? 1 : 2)
    grouped_attention_d_kv_plain_kernel(GroupedProblem<T> a, const KeyTile* tiles,
                                        const Reader* readers, const T* d_out, const float* lse,
                                        const float* delta, T* d_k, T* d_v, int64_t d_row) {
  constexpr int Owned = kOwned<Dim>, Rows = Owned / kSide;
  SMEM_DYN(memory);
  float* k = reinterpret_cast<float*>(memory);
  float* v = k + Owned * (Dim + kPad);
  float* q = v + Owned * (Dim + kPad);
  float* dout = q + kStep * (Dim + kPad);
  float* p = dout + kStep * (Dim + kPad);
  float* ds = p + kStep * (Owned + kPad);
  const int y = threadIdx.x / kSide, x = threadIdx.x % kSide;
  const KeyTile tile = tiles[blockIdx.x];
  const int64_t dout_row = static_cast<int64_t>(a.heads) * a.d;

  for (int head = blockIdx.y; head < a.key_heads; head += gridDim.y) {
    const int64_t column = static_cast<int64_t>(head) * a.d;
    __syncthreads();
    load_tile<Owned, Dim>(k, a.k + tile.row * a.k_row + column, a.k_row, 0, tile.length, a.d);
    load_tile<Owned, Dim>(v, a.v + tile.row * a.v_row + column, a.v_row, 0, tile.length, a.d);
    float dk[Rows][Dim / kSide] = {}, dv[Rows][Dim / kSide] = {};
    for (int reader = tile.first_reader; reader < tile.first_reader + tile.readers; ++reader) {
      const int first_key = readers[reader].key;
      const GroupedSequence s = a.sequences[readers[reader].sequence];
      const int rows = s.queries * a.group;
      for (int row = 0; row < rows; row += kStep) {
        const int last = (row + kStep < rows ? row + kStep : rows) - 1;
        if (s.visible(last / a.group, a.causal) <= first_key) continue;
        load_rows<kStep, Dim>(q, rows - row, a.d,
                              [&](int r) { return a.q + a.row(s, row + r, head, a.q_row); });
        load_rows<kStep, Dim>(dout, rows - row, a.d,
                              [&](int r) { return d_out + a.row(s, row + r, head, dout_row); });
        __syncthreads();
        float logits[kStepRows][Rows], dp[kStepRows][Rows];
        gemm_nt<Dim>(logits, q, k, a.d);
        gemm_nt<Dim>(dp, dout, v, a.d);
#pragma unroll
        for (int i = 0; i < kStepRows; ++i) {
          const int at = y * kStepRows + i;
          const bool inside = row + at < rows;
          const int seen = inside ? s.visible((row + at) / a.group, a.causal) - first_key : 0;
          const float lse_row = inside ? lse[a.log(s, row + at, head)] : 0.0f;
          const float delta_row = inside ? delta[a.log(s, row + at, head)] : 0.0f;
#pragma unroll
          for (int j = 0; j < Rows; ++j) {
            const bool sees = x + j * kSide < seen;
            const float prob = sees ? expf(logits[i][j] * a.scale - lse_row) : 0.0f;
            const int to = at * (Owned + kPad) + x + j * kSide;
            p[to] = prob;
            ds[to] = sees ? prob * (dp[i][j] - delta_row) * a.scale : 0.0f;
          }
        }
        __syncthreads();
        const int left = rows - row, n = left < kStep ? left : kStep;
        gemm_tn<Owned, Dim>(dv, p, dout, n);
        gemm_tn<Owned, Dim>(dk, ds, q, n);
        __syncthreads();
      }
    }
    __syncthreads();  // without readers, k and v are still being loaded
    store_to_shared<Dim>(k, dk);
    store_to_shared<Dim>(v, dv);
    __syncthreads();
    const int64_t to = tile.row * d_row + column, angles = static_cast<int64_t>(tile.row) * a.d;
    store_tile<Owned, Dim>(k, d_k + to, d_row, 0, tile.length, a.d,
                           a.cos ? a.cos + angles : nullptr, a.cos ? a.sin + angles : nullptr);
    store_tile<Owned, Dim>(v, d_v + to, d_row, 0, tile.length, a.d, nullptr, nullptr);
  }
}

template <class T, int Dim>
__global__ void __launch_bounds__(kThreads, Dim > 80 ? 1 : 2)
    grouped_attention_d_q_plain_kernel(GroupedProblem<T> a, const T* d_out, const float* lse,
                                       const float* delta, T* d_q, int64_t d_row) {
  constexpr int Owned = kOwned<Dim>, Rows = Owned / kSide;
  SMEM_DYN(memory);
  float* q = reinterpret_cast<float*>(memory);
  float* dout = q + Owned * (Dim + kPad);
  float* k = dout + Owned * (Dim + kPad);
  float* v = k + kStep * (Dim + kPad);
  float* ds = v + kStep * (Dim + kPad);
  const int y = threadIdx.x / kSide, x = threadIdx.x % kSide;
  const GroupedTile tile = a.tiles[blockIdx.x];
  const GroupedSequence s = a.sequences[tile.sequence];
  const int rows = s.queries * a.group - tile.first;
  const int last = (rows < Owned ? rows : Owned) - 1;
  const int keys = s.visible((tile.first + last) / a.group, a.causal);
  const int64_t dout_row = static_cast<int64_t>(a.heads) * a.d;

  for (int head = blockIdx.y; head < a.key_heads; head += gridDim.y) {
    const int64_t column = static_cast<int64_t>(head) * a.d;
    __syncthreads();
    load_rows<Owned, Dim>(q, rows, a.d,
                          [&](int r) { return a.q + a.row(s, tile.first + r, head, a.q_row); });
    load_rows<Owned, Dim>(dout, rows, a.d,
                          [&](int r) { return d_out + a.row(s, tile.first + r, head, dout_row); });
    float lse_row[Rows], delta_row[Rows], dq[Rows][Dim / kSide] = {};
    int visible[Rows];
#pragma unroll
    for (int i = 0; i < Rows; ++i) {
      const int r = y * Rows + i;
      const bool inside = r < rows;
      visible[i] = inside ? s.visible((tile.first + r) / a.group, a.causal) : 0;
      lse_row[i] = inside ? lse[a.log(s, tile.first + r, head)] : 0.0f;
      delta_row[i] = inside ? delta[a.log(s, tile.first + r, head)] : 0.0f;
    }
    for (int key = 0; key < keys; key += kStep) {
      load_rows<kStep, Dim>(k, keys - key, a.d,
                            [&](int r) { return a.k + a.key(s, key + r, a.k_row) + column; });
      load_rows<kStep, Dim>(v, keys - key, a.d,
                            [&](int r) { return a.v + a.key(s, key + r, a.v_row) + column; });
      __syncthreads();
      float logits[Rows][kStepRows], dp[Rows][kStepRows];
      gemm_nt<Dim>(logits, q, k, a.d);
      gemm_nt<Dim>(dp, dout, v, a.d);
#pragma unroll
      for (int i = 0; i < Rows; ++i)
#pragma unroll
        for (int j = 0; j < kStepRows; ++j) {
          const int at = x + j * kSide;
          const float prob = expf(logits[i][j] * a.scale - lse_row[i]);
          ds[(y * Rows + i) * (kStep + kPad) + at] =
              key + at < visible[i] ? prob * (dp[i][j] - delta_row[i]) * a.scale : 0.0f;
        }
      __syncthreads();
      const int left = keys - key;
      gemm_nn<kStep, Dim>(dq, ds, k, left < kStep ? left : kStep);
      __syncthreads();
    }
    __syncthreads();  // without keys, q is still being loaded
    store_to_shared<Dim>(q, dq);
    __syncthreads();
    for (int i = threadIdx.x; i < Owned * Dim; i += kThreads) {
      const int r = i / Dim, c = i % Dim;
      if (r >= rows || c >= a.d) continue;
      const float* from = q + r * (Dim + kPad);
      const int64_t angles = (s.query + (tile.first + r) / a.group) * static_cast<int64_t>(a.d);
      const auto entry = [from](int j) { return from[j]; };
      const float value =
          a.cos ? rotate_half(entry, a.cos + angles, a.sin + angles, c, a.d / 2, true) : from[c];
      d_q[a.row(s, tile.first + r, head, d_row) + c] = from_float<T>(value);
    }
  }
}

// All rows of k and v, cut where a sequence's keys begin or end and every `step` rows, those with
// most readers first.
struct KeyTiles {
  std::vector<KeyTile> tiles;
  std::vector<Reader> readers;

  KeyTiles(const GroupedKeys& keys, int64_t rows, int64_t step) {
    std::vector<int32_t> cuts{0, static_cast<int32_t>(rows)};
    for (const GroupedSequence& s : keys.sequences)
      for (const int32_t cut :
           {s.shared_row, s.shared_row + s.shared, s.own_row, s.own_row + s.own})
        cuts.push_back(cut);
    std::sort(cuts.begin(), cuts.end());
    cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
    for (size_t i = 0; i + 1 < cuts.size(); ++i) {
      std::vector<Reader> found;
      for (size_t s = 0; s < keys.sequences.size(); ++s) {
        const GroupedSequence& x = keys.sequences[s];
        const auto within = [&](int32_t first, int32_t n) {
          return cuts[i] >= first && cuts[i] < first + n;
        };
        if (within(x.shared_row, x.shared))
          found.push_back({static_cast<int32_t>(s), cuts[i] - x.shared_row});
        if (within(x.own_row, x.own))
          found.push_back({static_cast<int32_t>(s), x.shared + cuts[i] - x.own_row});
      }
      for (int64_t row = cuts[i]; row < cuts[i + 1]; row += step) {
        tiles.push_back({static_cast<int32_t>(row),
                         static_cast<int32_t>(std::min(step, cuts[i + 1] - row)),
                         static_cast<int32_t>(readers.size()), static_cast<int32_t>(found.size())});
        for (const Reader& r : found)
          readers.push_back({r.sequence, r.key + static_cast<int32_t>(row) - cuts[i]});
      }
    }
    std::stable_sort(tiles.begin(), tiles.end(),
                     [](const KeyTile& a, const KeyTile& b) { return a.readers > b.readers; });
  }
};

}  // namespace

void plain_grouped_attention_backward(const AttentionBackwardArgs& a, Device& device) {
  const AttentionLayout in = attention_layout(a.q, a.k, a.v, a.qkv);
  const AttentionLayout grad = attention_layout(a.d_q, a.d_k, a.d_v, a.d_qkv);
  if (!in.key_heads) return;
  const GroupedKeys keys(a.keys, a.cu_seqlens);
  const Scratch delta_memory = device.scratch(in.tokens * in.heads * sizeof(float));
  float* delta = delta_memory.as<float>();
  const float* lse = a.lse.as<const float>();
  with_float_type(in.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const T* d_out = a.d_out.as<const T>();
    if (in.tokens) attention_delta(d_out, a.out.as<const T>(), delta, in, device);
    const AttentionOnDevice<T> rotated(in, a.cos, a.sin, a.scale, device);
    GroupedOnDevice<T> call(rotated.problem(), in, keys, device);
    with_tile_width(in.head_dim, [&](auto dim) {
      constexpr int Dim = decltype(dim)::value, Owned = kOwned<Dim>;
      const size_t inputs = 2 * tile_bytes(Owned, Dim) + 2 * tile_bytes(kStep, Dim);
      const KeyTiles tiles(keys, in.key_tokens, Owned);
      call.run(grouped_attention_d_q_plain_kernel<T, Dim>, Owned, kThreads,
               inputs + tile_bytes(Owned, kStep), d_out, lse, static_cast<const float*>(delta),
               reinterpret_cast<T*>(grad.q), grad.row);
      if (tiles.tiles.empty()) return;
      GroupedProblem<T> p = call.problem();
      const KeyTile* on_device = nullptr;
      const Reader* readers = nullptr;
      const ScratchWorkspace scratch(device, [&](Workspace& w) {
        p.sequences = upload(device, w, keys.sequences);
        on_device = upload(device, w, tiles.tiles);
        readers = upload(device, w, tiles.readers);
      });
      const dim3 grid(static_cast<unsigned>(tiles.tiles.size()),
                      static_cast<unsigned>(p.key_heads < 65535 ? p.key_heads : 65535));
      launch(grouped_attention_d_kv_plain_kernel<T, Dim>, grid, kThreads,
             inputs + 2 * tile_bytes(kStep, Owned), stream_of(device), p, on_device, readers, d_out,
             lse, static_cast<const float*>(delta), reinterpret_cast<T*>(grad.k),
             reinterpret_cast<T*>(grad.v), grad.key_row);
    });
  });
}

}  // namespace p2r::cuda

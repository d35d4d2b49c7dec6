// Attention with any of AttentionKeys, grouped key heads, or keys in pages (ops/attention.h,
// ops/cached_attention.h): what its kernels share. A sequence's rows are its queries, each with the
// query heads of one key head in turn, so that a key is loaded once for all of them.
#pragma once
#include <vector>

#include "cuda/attention/attention.cuh"
#include "cuda/workspace.h"
#include "ops/cached_attention.h"

namespace p2r::cuda {

// A division by a number that is the same for a whole call, of 0 to 2^31 - 1: a multiplication.
// With l = ceil(log2 d), the multiplier ceil(2^(31 + l) / d) exceeds 2^(31 + l) / d by less than
// 2^l / d, and so a quotient by less than 1 / d.
struct Divisor {
  uint32_t divisor = 1, multiplier = 1u << 31;
  int shift = 31;

  Divisor() = default;
  explicit Divisor(int64_t d) : divisor(static_cast<uint32_t>(d)) {
    while (int64_t{1} << (shift - 31) < d) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor);
  }
  __host__ __device__ int quotient(int n) const {
    return static_cast<int>(uint64_t{static_cast<uint32_t>(n)} * multiplier >> shift);
  }
  __host__ __device__ int remainder(int n) const {
    return n - quotient(n) * static_cast<int>(divisor);
  }
};

struct GroupedSequence {
  int32_t query, queries;       // rows of q
  int32_t shared, own;          // keys that every query sees, and those after them
  int32_t shared_row, own_row;  // where they begin among the rows of k and v, or
  int32_t table;                // where the sequence's pages begin in GroupedProblem::tables

  __host__ __device__ int keys() const { return shared + own; }
  // How many keys query i sees.
  __host__ __device__ int visible(int i, bool causal) const {
    if (!causal) return shared + own;
    const int seen = i + 1 + own - queries;
    return shared + (seen < 0 ? 0 : seen < own ? seen : own);
  }
  // The first query that sees a key, or `queries`.
  __host__ __device__ int first_query(int key, bool causal) const {
    if (!causal || key < shared) return 0;
    const int first = key - shared - own + queries;
    return first < 0 ? 0 : first < queries ? first : queries;
  }
};

// Consecutive rows of a sequence.
struct GroupedTile {
  int32_t sequence, first;
};

// For a kernel that owns keys: a sequence that sees a tile of them, whose first is its logical key
// `key`, and rows of k and v with readers first_reader .. first_reader + readers - 1.
struct KeyReader {
  int32_t sequence, key;
};
struct KeyTile {
  int32_t row, length, first_reader, readers;
};

template <class T>
struct GroupedProblem {
  const T *q, *k, *v;
  int64_t q_row, k_row, v_row;  // elements from token to token
  int64_t key_head;             // and from key head to key head
  const GroupedSequence* sequences;
  const GroupedTile* tiles;
  const KeyTile* key_tiles;  // null in a forward pass
  const KeyReader* readers;
  const int32_t* tables;  // pages, or null
  int64_t page_stride;
  Divisor page;  // by the tokens of a page
  int64_t tokens;
  int heads, key_heads, d;
  int group;  // query heads of a key head
  Divisor by_group;
  float scale;
  bool causal;
  const float *cos, *sin;  // as in AttentionProblem

  // Elements from k or v, of `row` elements a token, to key j of a sequence, head 0.
  __device__ int64_t key(const GroupedSequence& s, int j, int64_t row) const {
    if (tables) return tables[s.table + page.quotient(j)] * page_stride + page.remainder(j) * row;
    return (j < s.shared ? s.shared_row + j : s.own_row + j - s.shared) * row;
  }
  // Elements from q to a row of a sequence, by [T, H, D] tensors with `row` elements a token.
  __device__ int64_t row(const GroupedSequence& s, int r, int key_head, int64_t row) const {
    return (s.query + by_group.quotient(r)) * row +
           static_cast<int64_t>(key_head * group + by_group.remainder(r)) * d;
  }
  // The same in lse and delta, [H, T].
  __device__ int64_t log(const GroupedSequence& s, int r, int key_head) const {
    return static_cast<int64_t>(key_head * group + by_group.remainder(r)) * tokens + s.query +
           by_group.quotient(r);
  }
  // How many keys a row of a sequence sees.
  __device__ int visible(const GroupedSequence& s, int r) const {
    return s.visible(by_group.quotient(r), causal);
  }
};

// A call's sequences on the host.
struct GroupedKeys {
  std::vector<GroupedSequence> sequences;
  std::vector<int32_t> tables;
  bool causal = false;

  GroupedKeys(const AttentionKeys& keys, const Ints& cu_seqlens) : causal(keys.causal) {
    for (size_t s = 0; s < keys.sequences(cu_seqlens); ++s) {
      const AttentionSequence x = keys.sequence(cu_seqlens, s);
      const auto n = [](int64_t i) { return static_cast<int32_t>(i); };
      sequences.push_back(
          {n(x.query), n(x.queries), n(x.shared_keys), n(x.own_keys), n(x.shared), n(x.own), 0});
    }
  }
  explicit GroupedKeys(const CachedAttentionArgs& a)
      : tables(a.tables.begin(), a.tables.end()), causal(true) {
    int64_t table = 0;
    for (size_t s = 0; s < a.lengths.size(); table += a.pages_of(s++)) {
      const auto n = [](int64_t i) { return static_cast<int32_t>(i); };
      sequences.push_back(
          {n(a.cu_seqlens[s]), n(a.new_tokens(s)), 0, n(a.total(s)), 0, 0, n(table)});
    }
  }

  // Every `step` rows of every sequence, those with most keys first.
  std::vector<GroupedTile> tiles(int group, int64_t step) const {
    std::vector<GroupedTile> tiles;
    for (size_t s = 0; s < sequences.size(); ++s)
      for (int64_t first = 0; first < int64_t{sequences[s].queries} * group; first += step)
        tiles.push_back({static_cast<int32_t>(s), static_cast<int32_t>(first)});
    const auto keys = [&](const GroupedTile& t) {
      const GroupedSequence& s = sequences[static_cast<size_t>(t.sequence)];
      const int64_t last = (t.first + step - 1) / group;
      return s.visible(static_cast<int>(std::min<int64_t>(last, s.queries - 1)), causal);
    };
    std::stable_sort(tiles.begin(), tiles.end(),
                     [&](const GroupedTile& a, const GroupedTile& b) { return keys(a) > keys(b); });
    return tiles;
  }
};

// All rows of k and v, cut where a sequence's keys begin or end and every `step` rows, those that
// most queries see first.
struct KeyTiles {
  std::vector<KeyTile> tiles;
  std::vector<KeyReader> readers;

  KeyTiles(const GroupedKeys& keys, int64_t rows, int64_t step) {
    std::vector<int32_t> cuts{0, static_cast<int32_t>(rows)};
    for (const GroupedSequence& s : keys.sequences)
      for (const int32_t cut :
           {s.shared_row, s.shared_row + s.shared, s.own_row, s.own_row + s.own})
        cuts.push_back(cut);
    std::sort(cuts.begin(), cuts.end());
    cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
    for (size_t i = 0; i + 1 < cuts.size(); ++i) {
      std::vector<KeyReader> found;
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
        for (const KeyReader& r : found)
          readers.push_back({r.sequence, r.key + static_cast<int32_t>(row) - cuts[i]});
      }
    }
    const auto queries = [&](const KeyTile& t) {
      int64_t n = 0;
      for (int32_t r = t.first_reader; r < t.first_reader + t.readers; ++r) {
        const GroupedSequence& s =
            keys.sequences[static_cast<size_t>(readers[static_cast<size_t>(r)].sequence)];
        n += s.queries - s.first_query(readers[static_cast<size_t>(r)].key, keys.causal);
      }
      return n;
    };
    std::stable_sort(tiles.begin(), tiles.end(),
                     [&](const KeyTile& a, const KeyTile& b) { return queries(a) > queries(b); });
  }
};

// A call on the device.
template <class T>
class GroupedOnDevice {
 public:
  GroupedOnDevice(const AttentionProblem<T>& p, const AttentionLayout& in, const GroupedKeys& keys,
                  Device& device)
      : keys_(keys), device_(device) {
    p_.q = p.q;
    p_.k = p.k;
    p_.v = p.v;
    // Rows of rotated q and k are apart from v's.
    const bool rotated = reinterpret_cast<const char*>(p.q) != in.q;
    p_.q_row = p.qk_row;
    p_.k_row = rotated ? p.qk_row : in.key_row;
    p_.v_row = in.key_row;
    p_.key_head = in.head_dim;
    p_.tokens = in.tokens;
    p_.heads = static_cast<int>(in.heads);
    p_.key_heads = static_cast<int>(in.key_heads);
    p_.group = static_cast<int>(in.group());
    p_.by_group = Divisor(in.group());
    p_.d = static_cast<int>(in.head_dim);
    p_.scale = p.scale;
    p_.causal = keys.causal;
    p_.cos = p.cos;
    p_.sin = p.sin;
  }
  GroupedOnDevice(const CachedAttentionArgs& a, const GroupedKeys& keys, Device& device)
      : keys_(keys), device_(device) {
    p_.q = a.q.as<const T>();
    p_.k = reinterpret_cast<const T*>(a.layer_keys());
    p_.v = p_.k + a.value_offset();
    p_.tokens = a.q.shape[0];
    p_.heads = static_cast<int>(a.q.shape[1]);
    p_.key_heads = static_cast<int>(a.k.shape[1]);
    p_.group = p_.heads / p_.key_heads;
    p_.by_group = Divisor(p_.group);
    p_.d = static_cast<int>(a.q.shape[2]);
    p_.q_row = a.q.shape[1] * a.q.shape[2];
    p_.k_row = p_.v_row = p_.d;
    p_.page = Divisor(a.page_size());
    p_.key_head = a.page_size() * a.q.shape[2];
    p_.page_stride = a.page_stride();
    p_.scale = static_cast<float>(a.scale);
    p_.causal = keys.causal;
  }
  const GroupedProblem<T>& problem() const { return p_; }
  Device& device() const { return device_; }

  // Calls f with the problem, whose lists are on the device meanwhile, and how many tiles of `step`
  // rows it has, unless there are none.
  template <class F>
  void with_tiles(int step, F&& f) const {
    const std::vector<GroupedTile> tiles = keys_.tiles(p_.group, step);
    if (tiles.empty() || !p_.key_heads) return;
    GroupedProblem<T> p = p_;
    const ScratchWorkspace scratch(device_, [&](Workspace& w) {
      p.sequences = upload(device_, w, keys_.sequences);
      p.tiles = upload(device_, w, tiles);
      p.tables = keys_.tables.empty() ? nullptr : upload(device_, w, keys_.tables);
    });
    f(p, static_cast<int64_t>(tiles.size()));
  }

  // Calls f with the problem and how many tiles of `step` rows of k and v it has, unless there are
  // none.
  template <class F>
  void with_key_tiles(int64_t rows, int step, F&& f) const {
    const KeyTiles tiles(keys_, rows, step);
    if (tiles.tiles.empty() || !p_.key_heads) return;
    GroupedProblem<T> p = p_;
    const ScratchWorkspace scratch(device_, [&](Workspace& w) {
      p.sequences = upload(device_, w, keys_.sequences);
      p.key_tiles = upload(device_, w, tiles.tiles);
      p.readers = upload(device_, w, tiles.readers);
    });
    f(p, static_cast<int64_t>(tiles.tiles.size()));
  }

  // Runs kernel(problem, rest...) with a block for every `step` rows of a sequence and every key
  // head.
  template <class... P, class... A>
  void run(void (*kernel)(GroupedProblem<T>, P...), int step, int threads, size_t smem,
           A... rest) const {
    with_tiles(step, [&](const GroupedProblem<T>& p, int64_t tiles) {
      const dim3 grid(static_cast<unsigned>(tiles),
                      static_cast<unsigned>(p.key_heads < 65535 ? p.key_heads : 65535));
      launch(kernel, grid, threads, smem, stream_of(device_), p, rest...);
    });
  }

 private:
  const GroupedKeys& keys_;
  Device& device_;
  GroupedProblem<T> p_{};
};

// By the name of the kernel, as in attention.cuh.
void plain_grouped_attention(const AttentionArgs& a, Device& device);
void plain_grouped_attention_backward(const AttentionBackwardArgs& a, Device& device);
void plain_cached_attention(const CachedAttentionArgs& a, Device& device);
void mma_grouped_attention(const AttentionArgs& a, Device& device);  // f16 and bf16, as all of mma
void mma_grouped_attention_backward(const AttentionBackwardArgs& a, Device& device);
void mma_cached_attention(const CachedAttentionArgs& a, Device& device);

}  // namespace p2r::cuda

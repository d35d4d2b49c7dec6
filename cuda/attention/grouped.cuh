// Attention with any of AttentionKeys, grouped key heads, or keys in pages (ops/attention.h,
// ops/cached_attention.h): what its kernels share. A sequence's rows are its queries, each with the
// query heads of one key head in turn, so that a key is loaded once for all of them.
#pragma once
#include <vector>

#include "cuda/attention/attention.cuh"
#include "cuda/workspace.h"
#include "ops/cached_attention.h"

namespace p2r::cuda {

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
};

// Consecutive rows of a sequence.
struct GroupedTile {
  int32_t sequence, first;
};

template <class T>
struct GroupedProblem {
  const T *q, *k, *v;
  int64_t q_row, k_row, v_row;  // elements from token to token
  int64_t key_head;             // and from key head to key head
  const GroupedSequence* sequences;
  const GroupedTile* tiles;
  const int32_t* tables;  // pages, or null
  int64_t page_stride;
  int page_size;
  int64_t tokens;
  int heads, key_heads, group, d;
  float scale;
  bool causal;
  const float *cos, *sin;  // as in AttentionProblem

  // Elements from k or v, of `row` elements a token, to key j of a sequence, head 0.
  __device__ int64_t key(const GroupedSequence& s, int j, int64_t row) const {
    if (tables) return tables[s.table + j / page_size] * page_stride + j % page_size * row;
    return (j < s.shared ? s.shared_row + j : s.own_row + j - s.shared) * row;
  }
  // Elements from q to a row of a sequence, by [T, H, D] tensors with `row` elements a token.
  __device__ int64_t row(const GroupedSequence& s, int r, int key_head, int64_t row) const {
    return (s.query + r / group) * row + static_cast<int64_t>(key_head * group + r % group) * d;
  }
  // The same in lse and delta, [H, T].
  __device__ int64_t log(const GroupedSequence& s, int r, int key_head) const {
    return static_cast<int64_t>(key_head * group + r % group) * tokens + s.query + r / group;
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
    p_.d = static_cast<int>(a.q.shape[2]);
    p_.q_row = a.q.shape[1] * a.q.shape[2];
    p_.k_row = p_.v_row = p_.d;
    p_.page_size = static_cast<int>(a.page_size());
    p_.key_head = a.page_size() * a.q.shape[2];
    p_.page_stride = a.page_stride();
    p_.scale = static_cast<float>(a.scale);
    p_.causal = keys.causal;
  }
  const GroupedProblem<T>& problem() const { return p_; }

  // Runs kernel(problem, rest...) with a block for every `step` rows of a sequence and every key
  // head.
  template <class... P, class... A>
  void run(void (*kernel)(GroupedProblem<T>, P...), int step, int threads, size_t smem, A... rest) {
    const std::vector<GroupedTile> tiles = keys_.tiles(p_.group, step);
    if (tiles.empty() || !p_.key_heads) return;
    GroupedProblem<T> p = p_;
    const ScratchWorkspace scratch(device_, [&](Workspace& w) {
      p.sequences = upload(device_, w, keys_.sequences);
      p.tiles = upload(device_, w, tiles);
      p.tables = keys_.tables.empty() ? nullptr : upload(device_, w, keys_.tables);
    });
    const dim3 grid(static_cast<unsigned>(tiles.size()),
                    static_cast<unsigned>(p.key_heads < 65535 ? p.key_heads : 65535));
    launch(kernel, grid, threads, smem, stream_of(device_), p, rest...);
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

}  // namespace p2r::cuda

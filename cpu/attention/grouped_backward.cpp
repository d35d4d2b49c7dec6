// The gradient of attention of rows (grouped.h), in two passes, so that every sum has one owner and
// one order: whatever the threads, and however many sequences share a key.
//
//   dQ:      for each block of rows, of a sequence and a key head
//              for each group of panels of NR keys that its last row sees
//                S = Q K^T, dP = dO V^T; P, dS       [rows][NR]: a key per lane
//                dQ += dS K
//   dK, dV:  for each tile of rows of k and v that the same sequences see, in their order
//              for each block of their rows from the first that sees a key of the tile
//                S, dP, P, dS again
//                dV^T += dO^T P, dK^T += Q^T dS      [D][NR]
//
// Seven products, as for the long sequences of backward.cpp. A tile of a shared prefix has the rows
// of all of its readers: 8 rollouts of 512 tokens after a prompt of 4300 multiply the prompt's keys
// once each, and the prompt's own rows are not there at all.
#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/attention/grouped.h"

namespace p2r::cpu::attention_kernels {

namespace {

constexpr int64_t kGroupPanels = 4;  // panels of keys of one product for dQ

// A sequence that sees a tile, whose first row of k and v is logical key `key` of it.
struct Reader {
  size_t sequence;
  int64_t key;
};

// Rows of k and v that the same sequences see.
struct KeyTile {
  Span rows;
  std::vector<Reader> readers;
};

// Rows of q, d_out and out of a block as operands.
struct RowBlock {
  Rows q, d_out;  // words
  int64_t n;
  const int32_t* visible;
};

struct Buffers {
  float *gathered, *other;  // rows of q, d_out, out, k or v
  float *q, *d_out, *q_t, *d_out_t;
  float *lse, *delta;
  float *s, *d_s, *d_s_rows, *d_q;
  float *k, *v, *k_rows, *d_k, *d_v;
  int32_t *visible, *seen;
  int64_t query_stride, d_s_stride;  // words of a row of q and d_out, and of d_s_rows

  Buffers(const Grouped& g, Workspace& workspace) {
    const Call& c = g.c;
    const int64_t d = c.in.head_dim, most = std::max(kQueryBlock, g.group);
    const int64_t rows = round_up(most, std::max<int64_t>(c.mr, 2 * c.width));
    const int64_t keys = std::max<int64_t>(kTaskKeys, kGroupPanels * c.nr);
    const auto take = [&](int64_t floats) { return workspace.take<float>(floats); };
    query_stride = c.depth(d) + 16;  // not powers of two, as for value_stride
    d_s_stride = c.depth(kGroupPanels * c.nr) + 16;
    gathered = take(std::max(most, keys) * d);
    other = take(most * d);
    q = take(most * query_stride);
    d_out = take(most * query_stride);
    q_t = take(round_up(d, c.mr) * c.depth(most));
    d_out_t = take(round_up(d, c.mr) * c.depth(most));
    lse = take(rows);
    delta = take(rows);
    s = take(std::max(rows, d) * c.nr);
    d_s = take(rows * c.nr);
    d_s_rows = take(rows * d_s_stride);
    d_q = take(most * d);
    k = take(round_up(keys, c.nr) * c.depth(d));
    v = take(round_up(keys, c.nr) * c.depth(d));
    k_rows = take(c.depth(kGroupPanels * c.nr) * round_up(d, c.nr));
    d_k = take(round_up(keys, c.nr) * d);
    d_v = take(round_up(keys, c.nr) * d);
    visible = workspace.take<int32_t>(rows);
    seen = workspace.take<int32_t>(rows);
  }
};

class Backward {
 public:
  Backward(const Grouped& g, const Buffers& w, const BackwardTensors& t, int64_t key_head)
      : g_(g), c_(g.c), w_(w), t_(t), key_head_(key_head) {}

  void d_q(const GroupedTask& task) {
    const GroupedSequence& s = g_.sequences[task.sequence];
    const int64_t d = c_.in.head_dim, group_keys = kGroupPanels * c_.nr;
    const RowBlock block = load(task, false);
    const int64_t end = w_.visible[block.n - 1];
    std::fill_n(w_.d_q, block.n * d, 0.0f);
    for (int64_t from = 0; from < end; from += group_keys) {
      const Span keys{from, std::min(from + group_keys, end)};
      load_keys(s, keys, true);
      for (int64_t p = 0; p < c_.panels(keys.size()); ++p)
        weights(block, p, std::min<int64_t>(keys.size() - p * c_.nr, c_.nr), from,
                w_.d_s_rows + p * c_.depth(c_.nr));
      c_.simd->gemm_rows(c_.pairs, {.m = block.n,
                                    .n = d,
                                    .k = keys.size(),
                                    .a = w_.d_s_rows,
                                    .lda = w_.d_s_stride,
                                    .b = w_.k_rows,
                                    .ldb = c_.nr,
                                    .c = w_.d_q,
                                    .ldc = d,
                                    .accumulate = true});
    }
    for (int64_t r = 0; r < block.n; ++r) {
      float* values = w_.d_q + r * d;
      const int64_t token = s.query + task.first + r / g_.group, angles = token * d;
      if (c_.cos)
        c_.simd->rotate_half(values, c_.cos + angles, c_.sin + angles, d / 2, true, values);
      const int64_t head = key_head_ * g_.group + r % g_.group;
      c_.simd->from_f32(c_.in.dtype, values,
                        t_.grad.q + (token * t_.grad.row + head * d) * c_.size(), d);
    }
  }

  void d_kv(const KeyTile& tile) {
    const int64_t d = c_.in.head_dim, n = tile.rows.size();
    std::fill_n(w_.d_k, round_up(n, c_.nr) * d, 0.0f);
    std::fill_n(w_.d_v, round_up(n, c_.nr) * d, 0.0f);
    for (const Reader& reader : tile.readers) {
      const GroupedSequence& s = g_.sequences[reader.sequence];
      const Span keys{reader.key, reader.key + n};
      int64_t first = 0;
      while (first < s.queries && s.visible(first, g_.causal) <= keys.begin) ++first;
      if (first == s.queries) continue;
      // The same keys for every reader, but a buffer that the rows of the last one have
      // overwritten.
      load_keys(s, keys, false);
      const int64_t queries = std::max<int64_t>(1, kQueryBlock / g_.group);
      for (; first < s.queries; first += queries) {
        const RowBlock block =
            load({reader.sequence, first, std::min(queries, s.queries - first)}, true);
        for (int64_t p = 0; p < c_.panels(n); ++p) {
          const int64_t count = std::min<int64_t>(n - p * c_.nr, c_.nr);
          weights(block, p, count, keys.begin, nullptr);
          const int64_t at = p * c_.nr * d;
          c_.multiply(d, c_.lanes(count), block.n, w_.d_out_t, w_.s, w_.d_v + at, c_.nr, true);
          c_.multiply(d, c_.lanes(count), block.n, w_.q_t, w_.d_s, w_.d_k + at, c_.nr, true);
        }
      }
    }
    for (int64_t p = 0; p < c_.panels(n); ++p) {
      const int64_t row = tile.rows.begin + p * c_.nr,
                    count = std::min<int64_t>(n - p * c_.nr, c_.nr);
      const int64_t to = (row * t_.grad.key_row + key_head_ * d) * c_.size(), angles = row * d;
      store_transposed(c_, w_.d_k + p * c_.nr * d, count, w_.s, t_.grad.k + to, t_.grad.key_row,
                       c_.cos ? c_.cos + angles : nullptr, c_.cos ? c_.sin + angles : nullptr);
      store_transposed(c_, w_.d_v + p * c_.nr * d, count, w_.s, t_.grad.v + to, t_.grad.key_row,
                       nullptr, nullptr);
    }
  }

 private:
  RowBlock load(const GroupedTask& task, bool transposed) {
    const GroupedSequence& s = g_.sequences[task.sequence];
    const int64_t n = task.queries * g_.group, d = c_.in.head_dim, row = c_.out_row();
    for (int64_t r = 0; r < n; ++r) {
      w_.visible[r] = static_cast<int32_t>(s.visible(task.first + r / g_.group, g_.causal));
      const int64_t head = key_head_ * g_.group + r % g_.group;
      w_.lse[r] = t_.lse[head * c_.in.tokens + s.query + task.first + r / g_.group];
    }
    const Rows d_out = gather_queries(g_, task, t_.d_out, row, key_head_, false, w_.gathered);
    const Rows out = gather_queries(g_, task, t_.out, row, key_head_, false, w_.other);
    c_.simd->dot_rows(c_.in.dtype, n, d, d_out.data, out.data, d, w_.delta);
    const Rows d_out_words = to_words(c_, d_out, n, w_.query_stride, w_.d_out);
    const Rows q = gather_queries(g_, task, c_.in.q, c_.in.row, key_head_,
                                  static_cast<bool>(c_.cos), w_.gathered);
    const Rows q_words = to_words(c_, q, n, w_.query_stride, w_.q);
    if (transposed) {
      c_.pack_a(q_words.transposed(), d, n, w_.q_t);
      c_.pack_a(d_out_words.transposed(), d, n, w_.d_out_t);
    }
    return {q_words, d_out_words, n, w_.visible};
  }

  void load_keys(const GroupedSequence& s, Span keys, bool rows) {
    const int64_t d = c_.in.head_dim;
    const Rows k =
        gather_keys(g_, s, g_.k, keys, key_head_, static_cast<bool>(c_.cos), w_.gathered);
    c_.pack_b(k, keys.size(), d, w_.k);
    if (rows) c_.pack_b(k.transposed(), d, keys.size(), w_.k_rows);
    c_.pack_b(gather_keys(g_, s, g_.v, keys, key_head_, false, w_.gathered), keys.size(), d, w_.v);
  }

  // P and dS of a block and panel p of the keys that are loaded, from logical key `first` on.
  void weights(const RowBlock& block, int64_t p, int64_t count, int64_t first, float* d_s_rows) {
    const int64_t key = first + p * c_.nr, panel = p * c_.nr * c_.depth(c_.in.head_dim);
    bool all = true;
    for (int64_t r = 0; r < block.n; ++r) {
      w_.seen[r] = static_cast<int32_t>(std::clamp<int64_t>(block.visible[r] - key, 0, count));
      all = all && w_.seen[r] == count;
    }
    RowGemm product = {.m = block.n,
                       .n = c_.lanes(count),
                       .k = c_.in.head_dim,
                       .a = w_.q,
                       .lda = w_.query_stride,
                       .b = w_.k + panel,
                       .ldb = c_.nr,
                       .c = w_.s,
                       .ldc = c_.nr};
    c_.simd->gemm_rows(c_.pairs, product);
    product.a = w_.d_out;
    product.b = w_.v + panel;
    product.c = w_.d_s;
    c_.simd->gemm_rows(c_.pairs, product);
    c_.simd->softmax_backward(c_.pairs, block.n, c_.nr, count, c_.scale, w_.lse, w_.delta,
                              all ? nullptr : w_.seen, w_.s, w_.d_s, d_s_rows, w_.d_s_stride);
  }

  const Grouped& g_;
  const Call& c_;
  const Buffers& w_;
  const BackwardTensors& t_;
  const int64_t key_head_;
};

// All rows of k and v, cut where a sequence's keys begin or end, and into tiles.
std::vector<KeyTile> key_tiles(const Grouped& g) {
  std::vector<std::pair<Span, Reader>> ranges;
  Ints cuts{0, g.c.in.key_tokens};
  for (size_t s = 0; s < g.sequences.size(); ++s) {
    const size_t end = s + 1 < g.sequences.size() ? g.sequences[s + 1].first_run : g.runs.size();
    for (size_t i = g.sequences[s].first_run; i < end; ++i) {
      const KeyRun& run = g.runs[i];
      const int64_t row = run.at / g.key_row;
      ranges.push_back({{row, row + run.count}, {s, run.key}});
      cuts.push_back(row);
      cuts.push_back(row + run.count);
    }
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  // Segments between cuts, each with the ranges that cover it.
  std::vector<std::vector<Reader>> readers(cuts.size());
  for (const auto& [rows, reader] : ranges)
    for (size_t i = static_cast<size_t>(std::lower_bound(cuts.begin(), cuts.end(), rows.begin) -
                                        cuts.begin());
         cuts[i] < rows.end; ++i)
      readers[i].push_back({reader.sequence, reader.key + cuts[i] - rows.begin});
  std::vector<KeyTile> tiles;
  for (size_t i = 0; i + 1 < cuts.size(); ++i)
    for (int64_t row = cuts[i]; row < cuts[i + 1]; row += kTaskKeys) {
      KeyTile tile{{row, std::min(row + kTaskKeys, cuts[i + 1])}, readers[i]};
      for (Reader& r : tile.readers) r.key += row - cuts[i];
      tiles.push_back(std::move(tile));
    }
  return tiles;
}

}  // namespace

void grouped_attention_backward(CpuDevice& cpu, std::shared_ptr<const Grouped> g,
                                const BackwardTensors& t) {
  if (!g->group) return;
  Workspace size(nullptr);
  Buffers(*g, size);
  const size_t bytes = size.bytes();
  const Scratch scratch = cpu.scratch(bytes * cpu.threads());
  const auto each = [&](auto tasks, auto f) {
    const auto shared = std::make_shared<const decltype(tasks)>(std::move(tasks));
    cpu.launch(static_cast<int64_t>(shared->size()) * g->key_heads, 1,
               [=, memory = scratch.as<char>()](int64_t begin, int64_t end, int thread) {
                 for (int64_t i = begin; i < end; ++i) {
                   Workspace workspace(memory + thread * bytes);
                   const Buffers w(*g, workspace);
                   Backward backward(*g, w, t, i % g->key_heads);
                   f(backward, (*shared)[i / g->key_heads]);
                 }
               });
  };
  each(make_tasks(*g, std::max<int64_t>(1, kQueryBlock / g->group)),
       [](Backward& b, const GroupedTask& task) { b.d_q(task); });
  std::vector<KeyTile> tiles = key_tiles(*g);
  const auto rows = [&](const KeyTile& tile) {
    int64_t n = 0;
    for (const Reader& r : tile.readers) n += g->sequences[r.sequence].queries;
    return n * tile.rows.size();
  };
  std::stable_sort(tiles.begin(), tiles.end(),
                   [&](const KeyTile& a, const KeyTile& b) { return rows(a) > rows(b); });
  each(std::move(tiles), [](Backward& b, const KeyTile& tile) { b.d_kv(tile); });
}

}  // namespace p2r::cpu::attention_kernels

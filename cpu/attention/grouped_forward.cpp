// Forward attention of rows (grouped.h), by the online softmax. For a task's rows and a key head:
//
//   for each chunk of keys
//     for each block of keys of it
//       for each panel of NR rows that sees any of them    S^T = K Q^T   [keys][NR]: a row per lane
//         P^T = exp(S^T - max), 0 for keys that a lane does not see
//         O = O rescale + P V
//     max, sum and O are merged with those of the chunks before
//   out = O / sum
//
// The few rows of a single query, which see the same keys, take a kernel that has keys as lanes
// (cpu/simd/ attention_few_rows.cpp), to the same bits.
//
// Chunks are what keys are divided by among threads, where there are few queries: then each is
// computed by itself, and they are merged in the same order afterwards.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/attention/grouped.h"
#include "cpu/simd/attention.h"

namespace p2r::cpu::attention_kernels {

namespace {

constexpr int64_t kMaxRows = 512, kMinRows = 64;  // of a task; fewer if there are few tasks
constexpr int64_t kFewRows = 8;                   // fewer than lanes

struct Buffers {
  float* gathered;                 // rows of q, then of k or v
  float *q, *k, *v;                // panels of q, panels of k, words of v
  float* s;                        // a tile of logits, then P
  float *o, *max, *sum;            // of a chunk
  float *all, *all_max, *all_sum;  // of all chunks so far
  float *rescale, *other_rescale;
  int32_t* visible;       // keys that each row sees
  int32_t* seen;          // those of them that are in a block
  const char** key_rows;  // of a chunk

  Buffers(const Grouped& g, Workspace& workspace, int64_t max_rows) {
    const Call& c = g.c;
    const int64_t d = c.in.head_dim, rows = round_up(max_rows, c.nr);
    const auto take = [&](int64_t floats) { return workspace.take<float>(floats); };
    gathered = take(std::max(max_rows, kKeyBlock) * d);
    q = take(rows * c.depth(d));
    k = take(round_up(kKeyBlock, c.mr) * c.depth(d));
    v = take(c.depth(kKeyBlock) * c.value_stride());
    s = take(std::max<int64_t>(c.nr, kFewRows) * round_up(kKeyBlock, kFewQueriesMargin));
    o = take(rows * d);
    max = take(rows);
    sum = take(rows);
    const bool chunks = g.max_keys() > kKeyChunk;
    all = chunks ? take(rows * d) : o;
    all_max = chunks ? take(rows) : max;
    all_sum = chunks ? take(rows) : sum;
    rescale = take(rows);
    other_rescale = take(rows);
    visible = workspace.take<int32_t>(rows);
    seen = workspace.take<int32_t>(c.nr);
    key_rows = workspace.take<const char*>(kKeyChunk + kFewQueriesMargin);
  }
};

// What a chunk of keys gives to rows: O before it is divided by sum.
struct Partial {
  float *o, *max, *sum;
};

bool is_finite(DType type, const Rows& x, int64_t n, int64_t d) {
  uint32_t exponents = 0;  // of which any is all ones
  for (int64_t r = 0; r < n; ++r) {
    if (type == DType::f32) {
      const auto* row = static_cast<const uint32_t*>(x.data) + r * x.stride;
      for (int64_t i = 0; i < d; ++i) exponents |= (row[i] & 0x7F800000u) == 0x7F800000u;
    } else {
      const uint16_t all = type == DType::bf16 ? 0x7F80 : 0x7C00;
      const auto* row = static_cast<const uint16_t*>(x.data) + r * x.stride;
      for (int64_t i = 0; i < d; ++i) exponents |= (row[i] & all) == all;
    }
  }
  return !exponents;
}

// The rows of a task against a key head.
class Attend {
 public:
  Attend(const Grouped& g, const Buffers& w, const GroupedTask& task, int64_t key_head)
      : g_(g),
        c_(g.c),
        w_(w),
        task_(task),
        sequence_(g.sequences[task.sequence]),
        key_head_(key_head),
        rows_(task.queries * g.group) {
    for (int64_t r = 0; r < rows_; ++r)
      w.visible[r] = static_cast<int32_t>(sequence_.visible(task.first + r / g.group, g.causal));
    // Lanes of no row see what the last row sees, so that they change nothing.
    std::fill(w.visible + rows_, w.visible + round_up(rows_, c_.nr), rows_ ? last_visible() : 0);
  }

  int64_t last_visible() const { return w_.visible[rows_ - 1]; }

  void load_queries() {
    const Rows q = gather_queries(g_, task_, g_.queries(), c_.in.row, key_head_,
                                  static_cast<bool>(c_.cos), w_.gathered);
    const int64_t d = c_.in.head_dim;
    if (!few()) return c_.pack_b(q, rows_, d, w_.q);
    // The panels of keys are not used.
    const Rows words = to_words(c_, q, rows_, c_.depth(d), w_.k);
    c_.simd->pack_few_rows(rows_, c_.depth(d), static_cast<const float*>(words.data), w_.q);
  }

  // The keys of one chunk.
  void chunk(int64_t begin, const Partial& to) {
    const int64_t d = c_.in.head_dim, end = std::min(begin + kKeyChunk, last_visible());
    std::fill_n(to.max, round_up(rows_, c_.nr), c_.initial_max());
    std::fill_n(to.sum, round_up(rows_, c_.nr), 0.0f);
    // Rows before the first that sees a key of the chunk have no product that writes them.
    std::fill_n(to.o, first_row(begin) * d, 0.0f);
    if (few()) return begin < end ? few_rows({begin, end}, to) : void();
    for (int64_t key = begin; key < end; key += kKeyBlock)
      block({key, std::min(key + kKeyBlock, end)}, key == begin, to);
  }

  // Adds a chunk to those before.
  void merge(const Partial& all, const Partial& chunk) {
    c_.simd->softmax_merge(round_up(rows_, c_.nr), c_.scale, all.max, all.sum, chunk.max, chunk.sum,
                           w_.rescale, w_.other_rescale);
    c_.simd->merge_rows(rows_, c_.in.head_dim, w_.rescale, w_.other_rescale, all.o, chunk.o);
  }

  void finish(const Partial& all, char* out, float* lse) {
    const int64_t d = c_.in.head_dim;
    c_.simd->softmax_finalize(round_up(rows_, c_.nr), c_.scale, all.max, all.sum, w_.rescale,
                              w_.other_rescale);
    for (int64_t r = 0; r < rows_; ++r)
      if (!w_.visible[r]) w_.other_rescale[r] = 0;  // not 1 / 0
    c_.simd->scale_rows(rows_, d, w_.other_rescale, all.o);
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t token = sequence_.query + task_.first + r / g_.group;
      const int64_t head = key_head_ * g_.group + r % g_.group;
      lse[head * c_.in.tokens + token] = w_.rescale[r];
      c_.simd->from_f32(c_.in.dtype, all.o + r * d,
                        out + (token * c_.out_row() + head * d) * c_.size(), d);
    }
  }

 private:
  // The first row that sees key `key`, which is a multiple of the group.
  int64_t first_row(int64_t key) const {
    return std::upper_bound(w_.visible, w_.visible + rows_, key) - w_.visible;
  }

  // Whether the rows are too few for lanes. They see the same keys, since there is one query.
  bool few() const { return task_.queries == 1 && rows_ <= kFewRows && !c_.cos; }

  void few_rows(Span keys, const Partial& to) {
    const char** row = w_.key_rows;
    const KeyRun* run = &g_.runs[sequence_.first_run];
    while (run->key + run->count <= keys.begin) ++run;
    const int64_t bytes = g_.key_row * c_.size();
    for (int64_t key = keys.begin; key < keys.end; ++run) {
      const char* from =
          g_.k + (run->at + (key - run->key) * g_.key_row + key_head_ * g_.key_head) * c_.size();
      const int64_t end = std::min(keys.end, run->key + run->count);
      for (; key < end; ++key, from += bytes) *row++ = from;
    }
    std::fill_n(row, kFewQueriesMargin, row[-1]);
    c_.simd->attend_few_rows({.rows = rows_,
                              .d = c_.in.head_dim,
                              .keys = keys.size(),
                              .block = kKeyBlock,
                              .pairs = c_.pairs,
                              .type = c_.in.dtype,
                              .scale = c_.scale,
                              .q = w_.q,
                              .k = w_.key_rows,
                              .v = g_.v - g_.k,
                              .s = w_.s,
                              .max = to.max,
                              .sum = to.sum,
                              .o = to.o});
  }

  void block(Span keys, bool first, const Partial& to) {
    const Simd& simd = *c_.simd;
    const int64_t d = c_.in.head_dim, n = keys.size(), first_seen = first_row(keys.begin);
    Prefetch ahead = prefetch_keys({keys.end, std::min(keys.end + kKeyBlock, last_visible())});
    set_interval(ahead, prefetch_slots(simd, n, rows_ - first_seen, c_.depth(d)));
    c_.pack_a(
        gather_keys(g_, sequence_, g_.k, keys, key_head_, static_cast<bool>(c_.cos), w_.gathered),
        n, d, w_.k);
    const Rows v = gather_keys(g_, sequence_, g_.v, keys, key_head_, false, w_.gathered);
    value_words(c_, v, n, c_.value_stride(), w_.v);
    // Weights of 0 do not keep out a value that is not finite.
    const bool some_unseen = w_.visible[first_seen] < keys.end;
    const bool by_rows = some_unseen && !is_finite(c_.in.dtype, v, n, d);

    for (int64_t from = first_seen / c_.nr * c_.nr; from < rows_; from += c_.nr) {
      const int64_t count = std::min<int64_t>(rows_ - from, c_.nr), lanes = c_.lanes(count);
      float *o = to.o + from * d, *max = to.max + from, *sum = to.sum + from;
      c_.multiply(n, lanes, d, w_.k, w_.q + from * c_.depth(d), w_.s, c_.nr, false, &ahead);
      const bool all_seen = n % 4 == 0 && w_.visible[from] >= keys.end;
      for (int64_t r = 0; r < lanes && !all_seen; ++r)
        w_.seen[r] = static_cast<int32_t>(w_.visible[from + r] - keys.begin);
      const bool rescaled =
          all_seen
              ? simd.softmax_update(c_.pairs, n, c_.nr, lanes, c_.scale, w_.s, max, sum, w_.rescale)
              : simd.softmax_update_visible(c_.pairs, round_up(n, 4), c_.nr, lanes, c_.scale,
                                            w_.seen, w_.s, max, sum, w_.rescale);
      if (rescaled && !first) simd.scale_rows(count, d, w_.rescale, o);
      if (by_rows) {
        for (int64_t r = 0; r < count; ++r)
          add_values(r, 1, std::clamp<int64_t>(w_.visible[from + r] - keys.begin, 0, n), first, o);
      } else {
        add_values(0, count, n, first, o);
      }
    }
  }

  // O (=, +=) P V of `count` rows of a panel and the first n keys of the block.
  void add_values(int64_t row, int64_t count, int64_t n, bool first, float* o) {
    const int64_t d = c_.in.head_dim;
    o += row * d;
    if (n == 0) {
      if (first) std::fill_n(o, count * d, 0.0f);
      return;
    }
    // The last pair of an odd number of keys has the next key's value beside its own.
    auto* last = reinterpret_cast<uint32_t*>(w_.v + n / 2 * c_.value_stride());
    uint32_t kept[kMaxDim];
    const bool odd = c_.pairs && n % 2;
    for (int64_t i = 0; odd && i < d; ++i) {
      kept[i] = last[i];
      last[i] &= 0xFFFFu;
    }
    c_.simd->gemm_rows(c_.pairs, {.m = count,
                                  .n = d,
                                  .k = n,
                                  .a = w_.s + row,
                                  .lda = c_.nr,
                                  .b = w_.v,
                                  .ldb = c_.value_stride(),
                                  .c = o,
                                  .ldc = d,
                                  .a_transposed = true,
                                  .accumulate = !first});
    for (int64_t i = 0; odd && i < d; ++i) last[i] = kept[i];
  }

  Prefetch prefetch_keys(Span keys) const {
    Prefetch p;
    if (keys.size() <= 0) return p;
    const KeyRun* run = &g_.runs[sequence_.first_run];
    while (run->key + run->count <= keys.begin) ++run;
    const int64_t bytes = c_.in.head_dim * c_.size();
    p.line = g_.k +
             (run->at + (keys.begin - run->key) * g_.key_row + key_head_ * g_.key_head) * c_.size();
    p.second = g_.v - g_.k;
    p.lines_left = p.lines = ceil_div(bytes, 64);
    p.rows = std::min(keys.end, run->key + run->count) - keys.begin;
    p.skip = g_.key_row * c_.size() - 64 * p.lines;
    return p;
  }

  const Grouped& g_;
  const Call& c_;
  const Buffers& w_;
  const GroupedTask& task_;
  const GroupedSequence& sequence_;
  const int64_t key_head_, rows_;
};

// Roughly, and the same for whatever is as long.
double work_of(const Grouped& g, const GroupedTask& t) {
  const GroupedSequence& s = g.sequences[t.sequence];
  return static_cast<double>(t.queries) *
         static_cast<double>(s.visible(t.first + t.queries - 1, g.causal));
}

}  // namespace

std::vector<GroupedTask> make_tasks(const Grouped& g, int64_t max_queries) {
  std::vector<GroupedTask> tasks;
  for (size_t s = 0; s < g.sequences.size(); ++s)
    for (int64_t first = 0; first < g.sequences[s].queries; first += max_queries)
      tasks.push_back({s, first, std::min(max_queries, g.sequences[s].queries - first)});
  return tasks;
}

Grouped::Grouped(const Call& call)
    : c(call),
      k(call.in.k),
      v(call.in.v),
      key_row(call.in.key_row),
      key_head(call.in.head_dim),
      key_heads(call.in.key_heads),
      group(call.in.group()) {}

Grouped::Grouped(const Call& call, const AttentionKeys& keys, const Ints& cu_seqlens)
    : Grouped(call) {
  causal = keys.causal;
  for (size_t s = 0; s < keys.sequences(cu_seqlens); ++s) {
    const AttentionSequence x = keys.sequence(cu_seqlens, s);
    const size_t first_run = runs.size();
    if (x.shared_keys) runs.push_back({0, x.shared_keys, x.shared * key_row});
    if (x.own_keys) runs.push_back({x.shared_keys, x.own_keys, x.own * key_row});
    sequences.push_back({x.query, x.queries, x.keys(), x.shared_keys, x.own_keys, first_run});
  }
}

int64_t Grouped::max_keys() const {
  int64_t most = 0;
  for (const GroupedSequence& s : sequences) most = std::max(most, s.keys);
  return most;
}

Rows gather_queries(const Grouped& g, const GroupedTask& t, const char* x, int64_t row,
                    int64_t key_head, bool rotate, float* buffer) {
  const Call& c = g.c;
  const int64_t d = c.in.head_dim, inner = g.group * d, bytes = inner * c.size();
  char* out = reinterpret_cast<char*>(buffer);
  const int64_t token = g.sequences[t.sequence].query + t.first;
  for (int64_t i = 0; i < t.queries; ++i, out += bytes) {
    std::memcpy(out, x + ((token + i) * row + key_head * inner) * c.size(), bytes);
    for (int64_t h = 0; rotate && h < g.group; ++h) {
      char* row = out + h * d * c.size();
      rotate_row(c, token + i, row, row);
    }
  }
  return {c.in.dtype, buffer, d};
}

Rows gather_keys(const Grouped& g, const GroupedSequence& s, const char* x, Span block,
                 int64_t key_head, bool rotate, float* buffer) {
  const Call& c = g.c;
  const KeyRun* run = &g.runs[s.first_run];
  while (run->key + run->count <= block.begin) ++run;
  const auto place = [&](int64_t key) {
    return x + (run->at + (key - run->key) * g.key_row + key_head * g.key_head) * c.size();
  };
  if (!rotate && run->key + run->count >= block.end)
    return {c.in.dtype, place(block.begin), g.key_row};
  const int64_t bytes = c.in.head_dim * c.size();
  char* out = reinterpret_cast<char*>(buffer);
  for (int64_t key = block.begin; key < block.end; ++key, out += bytes) {
    if (key == run->key + run->count) ++run;
    std::memcpy(out, place(key), bytes);
    if (rotate) rotate_row(c, run->at / g.key_row + key - run->key, out, out);
  }
  return {c.in.dtype, buffer, c.in.head_dim};
}

void grouped_attention(CpuDevice& cpu, std::shared_ptr<const Grouped> g, char* out, float* lse) {
  const Call& c = g->c;
  if (!g->group) return;  // no heads
  int64_t max_queries = std::max<int64_t>(1, kMaxRows / g->group);
  auto tasks = make_tasks(*g, max_queries);
  const auto items = [&] { return static_cast<int64_t>(tasks.size()) * g->key_heads; };
  while (max_queries * g->group > kMinRows && max_queries > 1 && items() < 4 * cpu.threads())
    tasks = make_tasks(*g, max_queries /= 2);
  if (!items()) return;
  std::stable_sort(tasks.begin(), tasks.end(), [&](const GroupedTask& a, const GroupedTask& b) {
    return work_of(*g, a) > work_of(*g, b);
  });
  int64_t most_queries = 0;
  for (const GroupedTask& t : tasks) most_queries = std::max(most_queries, t.queries);
  const int64_t rows = most_queries * g->group, panel_rows = round_up(rows, c.nr);
  Workspace size(nullptr);
  Buffers(*g, size, rows);
  const size_t bytes = size.bytes();
  const Scratch scratch = cpu.scratch(bytes * cpu.threads());

  // By chunks where there are few tasks: their partial results are in memory of their own.
  const int64_t chunks = ceil_div(g->max_keys(), kKeyChunk);
  const bool split = chunks > 1 && items() < 2 * cpu.threads();
  const int64_t partial_floats = panel_rows * (c.in.head_dim + 2);
  const Scratch partials =
      cpu.scratch(split ? items() * chunks * partial_floats * sizeof(float) : 0);
  const auto partial = [=, memory = partials.as<float>()](int64_t item, int64_t chunk) {
    float* at = memory + (item * chunks + chunk) * partial_floats;
    return Partial{at + 2 * panel_rows, at, at + panel_rows};
  };
  const auto shared_tasks = std::make_shared<const std::vector<GroupedTask>>(std::move(tasks));
  const auto attend = [=, memory = scratch.as<char>()](int64_t item, int thread, auto&& f) {
    Workspace workspace(memory + thread * bytes);
    const Buffers w(*g, workspace, rows);
    Attend a(*g, w, (*shared_tasks)[item / g->key_heads], item % g->key_heads);
    f(a, w);
  };
  const int64_t count = static_cast<int64_t>(shared_tasks->size()) * g->key_heads;
  if (split) {
    cpu.launch(count * chunks, 1, [=](int64_t begin, int64_t end, int thread) {
      for (int64_t i = begin; i < end; ++i)
        attend(i / chunks, thread, [&](Attend& a, const Buffers&) {
          if (i % chunks && i % chunks * kKeyChunk >= a.last_visible()) return;
          a.load_queries();
          a.chunk(i % chunks * kKeyChunk, partial(i / chunks, i % chunks));
        });
    });
  }
  cpu.launch(count, 1, [=](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i)
      attend(i, thread, [&](Attend& a, const Buffers& w) {
        const Partial all = split ? partial(i, 0) : Partial{w.all, w.all_max, w.all_sum};
        if (!split) {
          a.load_queries();
          a.chunk(0, all);
        }
        for (int64_t key = kKeyChunk; key < a.last_visible(); key += kKeyChunk) {
          const Partial chunk = split ? partial(i, key / kKeyChunk) : Partial{w.o, w.max, w.sum};
          if (!split) a.chunk(key, chunk);
          a.merge(all, chunk);
        }
        a.finish(all, out, lse);
      });
  });
}

}  // namespace p2r::cpu::attention_kernels

// Attention in tiles that stay in the cache, on the panels of the matrix product
// (cpu/simd/gemm.cpp).
//
// Forward, for a sequence, a head and up to kMostQueries queries:
//   for each block of keys
//     for each panel of NR queries      S^T = K Q^T        [keys][NR]: queries in lanes
//       P^T = exp(S^T - max)            in place; max, sum brought up to date
//       O = O decay + P V               [NR][D]; P^T as it lies
//   out = O / sum                       in the last of these products
// Queries are lanes that know nothing of each other, so how they are cut may follow the threads.
//
// Forward, of a sequence so short that a panel of P stays in L1, for each panel of NR queries, or
// two:
//   S^T = K Q^T                         [keys][NR]: K as it lies in memory
//   P^T = exp(S^T - max)                all keys at once: nothing is brought up to date
//   out = P V / sum                     [NR][D]: P^T, V and out as they lie
// Only Q is turned around; V is copied if it is not whole lines of f32. A window of 64 tokens is
// read and written in the time of its products, so its rows are asked for during those of the
// window before, line by line, and a large output goes past the caches.
//
// Backward, for queries and keys of a sequence and a head:
//   for each block of queries
//     for each group of panels of NR keys
//       for each of its panels          S = Q K^T, dP = dO V^T   [queries][NR]: keys in lanes
//         P = exp(S - lse), dS          in place, and dS once more in rows along the group's keys
//         dV^T += dO^T P, dK^T += Q^T dS  [D][NR]; P and dS are the packed panels as they lie
//       dQ += dS K                      all keys of the group at once
// Q, dO and the dS of dQ are read as rows. The rows of the next group and block, and those that the
// gradients go to, are asked for during the products before.
// A sequence short enough for its sums to stay in the cache is one task a head. A longer one is cut
// twice, along the keys for dK and dV and along the queries for dQ: seven products for five, but no
// sum crosses tasks. Which way is taken depends on the length and D alone.
//
// bf16 on a CPU that multiplies its pairs: every panel is one of pairs, so P and dS are rounded to
// bf16 where they enter a product, by up to 2^-8 of each; sums, lse and delta stay f32.
#include "ops/attention.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "cpu/device.h"
#include "cpu/gemm.h"

namespace p2r::cpu {

namespace {

// Forward: a task's queries, whose outputs stay in L2; few, if the threads had no work otherwise.
constexpr int64_t kMostQueries = 512, kFewestQueries = 64;
constexpr int64_t kKeys = 192;          // forward: keys of a block; a panel of P^T fills half of L1
constexpr int64_t kQueryBlock = 192;    // backward: queries of a block
constexpr int64_t kKeyGroup = 4;        // panels of keys of one product for dQ
constexpr int64_t kKeyChunk = 256;      // backward of a long sequence, and mass: a task's keys
constexpr int64_t kWhole = 832 * 1024;  // backward: floats of K, V, K^T, dK and dV of one task
constexpr int64_t kWholeTokens = 2304;  // and its longest sequence, or few threads would have work
constexpr int64_t kShortWords = 256;    // forward: a short sequence's row of P
constexpr int64_t kTwoPanels = 64;  // and the keys of which two panels stay in L1 beside K and V
constexpr int64_t kPastCaches = int64_t{32} << 20;  // bytes of an output that no cache holds
constexpr int64_t kMaxDim = 128;
// Multiply-adds worth handing to a thread: some 25 windows of 64 tokens, so that the rows it asks
// for ahead are mostly its own.
constexpr double kTaskWork = 1.6e7;

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// A range of tokens of one sequence.
struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
  // From `at` on, at most n tokens.
  Span part(int64_t at, int64_t n) const { return {at, std::min(at + n, end)}; }
};

// A task: some queries against some keys of a sequence, for each head.
struct Task {
  Span queries, keys;
  double work() const { return static_cast<double>(queries.size()) * keys.size(); }
};

// A head of a task; none, if the task is null.
struct Item {
  const Task* task;
  int64_t head;
};

enum class Cut { queries, keys };

// One task for each stretch of `step` tokens along one side. Long ones first, so that no thread is
// left with a long one at the end.
std::vector<Task> cut_up(const Ints& cu_seqlens, Cut side, int64_t step) {
  std::vector<Task> tasks;
  for (size_t s = 1; s < cu_seqlens.size(); ++s) {
    const Span whole{cu_seqlens[s - 1], cu_seqlens[s]};
    for (int64_t at = whole.begin; at < whole.end; at += step) {
      const Span part = whole.part(at, step);
      tasks.push_back(side == Cut::queries ? Task{part, whole} : Task{whole, part});
    }
  }
  const auto longer = [](const Task& a, const Task& b) { return a.work() > b.work(); };
  if (!std::is_sorted(tasks.begin(), tasks.end(), longer))
    std::stable_sort(tasks.begin(), tasks.end(), longer);
  return tasks;
}

// One head of some tokens of a tensor, where the packing can read it.
struct Rows {
  DType dtype;
  const void* data;
  int64_t stride, step = 1;  // from row to row, and along a row

  Rows transposed() const { return {dtype, data, step, stride}; }
};

// What all tasks of a call share.
struct Call {
  const Simd* simd;
  AttentionLayout in;
  const float *cos, *sin;  // null: no rotary
  float scale;
  bool pairs;  // bf16 in panels of pairs
  int mr, nr, width;

  Call(const CpuDevice& cpu, const AttentionLayout& layout, const View& cos_table,
       const View& sin_table, double s)
      : simd(&cpu.simd()),
        in(layout),
        cos(cos_table.as<float>()),
        sin(sin_table.as<float>()),
        scale(static_cast<float>(s)),
        pairs(cpu.features().bf16 && layout.dtype == DType::bf16),
        width(cpu.simd().vector_width()) {
    simd->gemm_tile_size(&mr, &nr);
  }

  int64_t size() const { return static_cast<int64_t>(size_of(in.dtype)); }
  int64_t lanes(int64_t n) const { return std::min<int64_t>(round_up(n, width), nr); }
  int64_t panels(int64_t n) const { return (n + nr - 1) / nr; }
  int64_t blocks(int64_t keys) const { return (keys + kKeys - 1) / kKeys; }
  // Words of a panel for k steps.
  int64_t depth(int64_t k) const { return pairs ? (k + 1) / 2 : k; }
  // Below all logits as scaled; with a scale of 0 they are equal, and 0 times infinity is a NaN.
  float lowest() const { return scale == 0 ? 0 : std::copysign(HUGE_VALF, -scale); }
  // Whether a row is made of whole lines of words: parts of one would be read twice, and written to
  // memory one by one.
  bool reads_in_place() const { return in.dtype == DType::f32 && in.head_dim % 16 == 0; }
  // Whether outputs are in the type that a product can end in.
  bool writes_in_place() const { return in.dtype == DType::f32 || pairs; }
  // Whether outputs go past the caches: so many that they would not be found there again, in whole
  // vectors, which are lines of f32 and halves of lines of bf16.
  bool past_caches(const char* out) const {
    return writes_in_place() && in.head_dim % 16 == 0 &&
           in.tokens * in.heads * in.head_dim * size() > kPastCaches &&
           reinterpret_cast<uintptr_t>(out) % 64 == 0;
  }
  // Words of a row of V: an odd number of lines, or rows would share their places in L1.
  int64_t value_row() const { return round_up(in.head_dim, 16) | 16; }
  bool is_short(int64_t keys) const { return depth(keys) <= kShortWords; }
  // Queries of a short sequence whose logits are made at once.
  int64_t group(int64_t keys) const { return keys <= kTwoPanels ? 2 * nr : nr; }

  // The packing and the product of simd.h, in the call's kind of panels.
  void pack_a(const Rows& x, int64_t m, int64_t k, float* out) const {
    simd->pack_a(pairs, x.dtype, x.data, x.stride, x.step, m, k, out);
  }
  void pack_b(const Rows& x, int64_t n, int64_t k, float* out) const {
    simd->pack_b(pairs, x.dtype, x.data, x.step, x.stride, k, n, out);
  }
  void multiply(int64_t m, int64_t n, int64_t k, const float* a, const float* b, float* to,
                int64_t ld, bool accumulate, Ahead* ahead = nullptr) const {
    simd->gemm_panels(pairs, m, n, k, a, b, to, ld, accumulate, ahead);
  }
};

Rows rows_of(const Call& c, const char* x, int64_t row, int64_t head, Span span) {
  return {c.in.dtype, x + (span.begin * row + head * c.in.head_dim) * c.size(), row};
}

// As rows_of, turned by the rotary tables and rounded to its type in `room`, if there are tables.
Rows rotated(const Call& c, const char* x, int64_t head, Span span, float* room) {
  const Rows rows = rows_of(c, x, c.in.row, head, span);
  if (!c.cos) return rows;
  const int64_t d = c.in.head_dim;
  char* out = reinterpret_cast<char*>(room);
  for (int64_t t = 0; t < span.size(); ++t) {
    float row[kMaxDim];
    const int64_t at = (span.begin + t) * d;
    c.simd->to_f32(c.in.dtype, static_cast<const char*>(rows.data) + t * rows.stride * c.size(),
                   row, d);
    c.simd->rotate_half(row, c.cos + at, c.sin + at, d / 2, false, row);
    c.simd->from_f32(c.in.dtype, row, out + t * d * c.size(), d);
  }
  return {c.in.dtype, room, d};
}

// A part of a thread's scratch, taken piece by piece; with null it only adds up the sizes.
class Room {
 public:
  explicit Room(float* at) : at_(at) {}
  float* take(int64_t floats) {
    float* taken = at_ ? at_ + used_ : nullptr;
    used_ += round_up(floats, 16);
    return taken;
  }
  int64_t used() const { return used_; }

 private:
  float* at_;
  int64_t used_ = 0;
};

// Writes x^T, [D][nr] with a token a lane, as rows of a tensor.
void store_columns(const Call& c, const float* x, int64_t tokens, float* room, char* out,
                   int64_t row, const float* cos, const float* sin) {
  const int64_t d = c.in.head_dim;
  c.simd->transpose(d, tokens, x, c.nr, room, d);
  for (int64_t t = 0; t < tokens; ++t) {
    float* line = room + t * d;
    if (cos) c.simd->rotate_half(line, cos + t * d, sin + t * d, d / 2, true, line);
    c.simd->from_f32(c.in.dtype, line, out + t * row * c.size(), d);
  }
}

// Rows of a tensor as rows of words, `ld` words apart in `room`.
Rows words_of(const Call& c, const Rows& x, int64_t n, int64_t ld, float* room) {
  to_words(*c.simd, c.pairs, x.dtype, x.data, x.stride, n, c.in.head_dim, room, ld);
  return {c.pairs ? DType::bf16 : DType::f32, room, c.pairs ? 2 * ld : ld};
}

// V in words, a row for each step of its product: a key, or a pair of them.
void values_of(const Call& c, const Rows& v, int64_t keys, int64_t ld, float* room) {
  if (c.pairs)
    c.simd->pair_rows(keys, c.in.head_dim, static_cast<const uint16_t*>(v.data), v.stride, room,
                      ld);
  else
    words_of(c, v, keys, ld, room);
}

// One head of some tokens of x, and of y, whose rows are as long.
Ahead ask_for(const Call& c, const char* x, const char* y, int64_t row, int64_t head, Span tokens) {
  Ahead a;
  const int64_t bytes = c.in.head_dim * c.size();
  a.line = x + (tokens.begin * row + head * c.in.head_dim) * c.size();
  a.second = y ? y - x : 0;
  a.left = a.lines = (bytes + 63) / 64;
  a.rows = tokens.size();
  a.skip = row * c.size() - 64 * a.lines;
  return a;
}

// The rows of what comes next, if it is a short sequence, which would wait for memory; those of
// `out` too, unless it is null.
Ahead rows_ahead(const Call& c, const Item& next, const char* out) {
  if (!next.task || !c.is_short(next.task->keys.size())) return {};
  Ahead a = ask_for(c, c.in.q, c.in.k, c.in.row, next.head, next.task->keys);
  a.third = c.in.v - c.in.q;
  const int64_t row = c.in.heads * c.in.head_dim;
  if (out) {
    a.result = ask_for(c, out, nullptr, row, next.head, next.task->queries).line;
    a.result_skip = row * c.size() - 64 * a.lines;
  }
  return a;
}

struct Forward {
  float *staged, *q, *k, *v, *s, *o, *max, *sum, *decay, *lse, *inverse;
  int64_t ld;  // words of a row of v
  Forward(const Call& c, Room& room, int64_t most) {
    const int64_t d = c.in.head_dim, queries = round_up(most, c.nr);
    staged = room.take(c.cos ? std::max(most, kKeys) * d : 0);
    q = room.take(queries * c.depth(d));
    k = room.take(round_up(kKeys, c.mr) * c.depth(d));
    ld = c.value_row();
    v = room.take(c.depth(kKeys) * ld);
    s = room.take(kKeys * c.nr);
    o = room.take(most * d);
    max = room.take(queries);
    sum = room.take(queries);
    decay = room.take(c.nr);
    lse = room.take(c.nr);
    inverse = room.take(c.nr);
  }
};

void forward(const Call& c, const Forward& w, const Task& task, int64_t head, const Item& next,
             char* out, float* lse) {
  const Simd& simd = *c.simd;
  const int64_t d = c.in.head_dim, queries = task.queries.size(), row = c.in.heads * d;
  c.pack_b(rotated(c, c.in.q, head, task.queries, w.staged), queries, d, w.q);
  std::fill_n(w.max, round_up(queries, c.nr), c.lowest());
  std::fill_n(w.sum, round_up(queries, c.nr), 0.0f);

  for (int64_t at = task.keys.begin; at < task.keys.end; at += kKeys) {
    const Span block = task.keys.part(at, kKeys);
    const bool first = at == task.keys.begin, last = block.end == task.keys.end;
    // What comes next is asked for during the products.
    Ahead keys, later;
    if (!last) {
      keys = ask_for(c, c.in.k, c.in.v, c.in.row, head, task.keys.part(block.end, kKeys));
    } else if (next.task) {
      const Span all = next.task->keys;
      keys = ask_for(c, c.in.k, c.in.v, c.in.row, next.head, all.part(all.begin, kKeys));
      later = ask_for(c, c.in.q, nullptr, c.in.row, next.head, next.task->queries);
    }
    spread(keys, chances_of(simd, block.size(), queries, c.depth(d)));
    spread(later, c.panels(queries) * chances_of(simd, c.nr, d, c.depth(block.size())));
    c.pack_a(rotated(c, c.in.k, head, block, w.staged), block.size(), d, w.k);
    values_of(c, rows_of(c, c.in.v, c.in.row, head, block), block.size(), w.ld, w.v);
    for (int64_t from = 0; from < queries; from += c.nr) {
      const int64_t n = std::min<int64_t>(queries - from, c.nr), lanes = c.lanes(n);
      const int64_t token = task.queries.begin + from;
      float* o = w.o + from * d;
      c.multiply(block.size(), lanes, d, w.k, w.q + from * c.depth(d), w.s, c.nr, false, &keys);
      const bool moved = simd.softmax_step(c.pairs, block.size(), c.nr, lanes, c.scale, w.s,
                                           w.max + from, w.sum + from, w.decay);
      if (moved && !first) simd.scale_rows(n, d, w.decay, o);
      if (last) {
        simd.softmax_finish(lanes, c.scale, w.max + from, w.sum + from, w.lse, w.inverse);
        std::copy_n(w.lse, n, lse + head * c.in.tokens + token);
      }
      simd.gemm_rows(c.pairs, {.m = n,
                               .n = d,
                               .k = block.size(),
                               .a = w.s,
                               .lda = c.nr,
                               .b = w.v,
                               .ldb = w.ld,
                               .c = o,
                               .ldc = d,
                               .turned = true,
                               .accumulate = !first,
                               .factor = last ? w.inverse : nullptr,
                               .ahead = &later});
      for (int64_t r = 0; r < n && last; ++r)
        simd.from_f32(c.in.dtype, o + r * d, out + ((token + r) * row + head * d) * c.size(), d);
    }
  }
}

struct Short {
  float *staged, *q, *k, *v, *s, *o, *max, *sum, *lse, *inverse;
  int64_t ld;  // words of a row of v
  Short(const Call& c, Room& room, int64_t most) {
    const int64_t d = c.in.head_dim;
    staged = room.take(c.cos ? most * d : 0);
    q = room.take(round_up(most, c.nr) * c.depth(d));
    k = room.take(c.in.dtype != DType::f32 && !c.pairs ? most * d : 0);
    ld = c.value_row();
    v = room.take(c.reads_in_place() ? 0 : c.depth(most) * ld);
    s = room.take(std::max(most, 2 * kTwoPanels) * c.nr);
    o = room.take(c.writes_in_place() ? 0 : 2 * c.nr * d);
    max = room.take(2 * c.nr);
    sum = room.take(2 * c.nr);
    lse = room.take(2 * c.nr);
    inverse = room.take(2 * c.nr);
  }
};

void forward_short(const Call& c, const Short& w, const Task& task, int64_t head, const Item& next,
                   char* out, float* lse) {
  const Simd& simd = *c.simd;
  const int64_t d = c.in.head_dim, keys = task.keys.size(), queries = task.queries.size();
  const int64_t row = c.in.heads * d, group = std::min(c.group(keys), round_up(queries, c.nr));
  lse += head * c.in.tokens + task.queries.begin;
  // A store that waits for memory would keep those behind it waiting.
  for (int64_t t = 0; t < queries; t += 16) __builtin_prefetch(lse + t, 1);
  c.pack_b(rotated(c, c.in.q, head, task.queries, w.staged), queries, d, w.q);
  // K in words.
  Rows k = rotated(c, c.in.k, head, task.keys, w.staged);
  if (c.in.dtype != DType::f32 && !c.pairs) k = words_of(c, k, keys, d, w.k);
  const bool as_it_lies = c.reads_in_place(), in_place = c.writes_in_place();
  const bool past_caches = c.past_caches(out);
  const Rows values = rows_of(c, c.in.v, c.in.row, head, task.keys);
  if (!as_it_lies) values_of(c, values, keys, w.ld, w.v);
  Ahead ahead = rows_ahead(c, next, past_caches ? nullptr : out);
  out += (task.queries.begin * row + head * d) * c.size();
  spread(ahead, chances_of(simd, keys, queries, c.depth(d)) +
                    c.panels(queries) * chances_of(simd, c.nr, d, c.depth(keys)));

  for (int64_t first = 0; first < queries; first += group) {
    const int64_t n = std::min(queries - first, group), lanes = round_up(n, c.width);
    simd.gemm_rows(c.pairs, {.m = keys,
                             .n = lanes,
                             .k = d,
                             .a = static_cast<const float*>(k.data),
                             .lda = c.pairs ? k.stride / 2 : k.stride,
                             .b = w.q + first * c.depth(d),
                             .ldb = c.nr,
                             .c = w.s,
                             .ldc = group,
                             .ahead = &ahead});
    std::fill_n(w.max, lanes, c.lowest());
    std::fill_n(w.sum, lanes, 0.0f);
    simd.softmax_step(c.pairs, keys, group, lanes, c.scale, w.s, w.max, w.sum, w.inverse);
    simd.softmax_finish(lanes, c.scale, w.max, w.sum, w.lse, w.inverse);
    std::copy_n(w.lse, n, lse + first);
    char* to = out + first * row * c.size();
    simd.gemm_rows(c.pairs, {.m = n,
                             .n = d,
                             .k = keys,
                             .a = w.s,
                             .lda = group,
                             .b = as_it_lies ? static_cast<const float*>(values.data) : w.v,
                             .ldb = as_it_lies ? values.stride : w.ld,
                             .c = w.o,
                             .ldc = d,
                             .turned = true,
                             .factor = w.inverse,
                             .out = in_place ? to : nullptr,
                             .ld_out = row,
                             .past_caches = past_caches,
                             .ahead = &ahead});
    for (int64_t r = 0; r < n && !in_place; ++r)
      simd.from_f32(c.in.dtype, w.o + r * d, to + r * row * c.size(), d);
  }
}

// What a backward pass is to sum up.
enum Wanted { kDq = 1, kDkDv = 2 };

struct Backward {
  float *staged, *q, *q_t, *d_out, *d_out_t, *delta, *s, *d_s, *d_s_rows, *d_q;
  float *k, *v, *k_rows, *d_k, *d_v;  // for each panel of keys
  int64_t panel, panel_rows;          // their sizes
  int64_t ld, ld_s;                   // words of a row of q and d_out, and of d_s_rows
  Backward(const Call& c, Room& room, int wanted, int64_t keys) {
    const int64_t d = c.in.head_dim, rows = round_up(kQueryBlock, c.mr);
    // No powers of two, see value_row.
    ld = c.depth(d) + 16;
    ld_s = c.depth(kKeyGroup * c.nr) + 16;
    q = room.take(kQueryBlock * ld);
    q_t = room.take(round_up(d, c.mr) * c.depth(kQueryBlock));
    d_out = room.take(kQueryBlock * ld);
    d_out_t = room.take(round_up(d, c.mr) * c.depth(kQueryBlock));
    delta = room.take(kQueryBlock);
    s = room.take(rows * c.nr);
    d_s = room.take(rows * c.nr);
    // What is turned is packed before there is dS.
    const int64_t turned = c.cos ? std::max<int64_t>(kQueryBlock, kKeyGroup * c.nr) * d : 0;
    d_s_rows = staged = room.take(std::max(wanted & kDq ? rows * ld_s : 0, turned));
    d_q = room.take(wanted & kDq ? kQueryBlock * d : 0);
    panel = c.nr * d;
    panel_rows = c.depth(c.nr) * round_up(d, c.nr);
    const int64_t slots = wanted & kDkDv ? c.panels(keys) : kKeyGroup;
    k = room.take(slots * c.depth(d) * c.nr);
    v = room.take(slots * c.depth(d) * c.nr);
    k_rows = room.take(wanted & kDq ? slots * panel_rows : 0);
    d_k = room.take(wanted & kDkDv ? slots * panel : 0);
    d_v = room.take(wanted & kDkDv ? slots * panel : 0);
  }
};

struct Answer {
  const char *d_out, *out;
  const float* lse;
  AttentionLayout grad;
};

void backward(const Call& c, const Backward& w, int wanted, const Task& task, int64_t head,
              const Answer& a) {
  const Simd& simd = *c.simd;
  const DType type = c.in.dtype;
  const int64_t d = c.in.head_dim, row = c.in.heads * d, group = kKeyGroup * c.nr;

  for (int64_t at = task.queries.begin; at < task.queries.end; at += kQueryBlock) {
    const Span block = task.queries.part(at, kQueryBlock);
    const int64_t n = block.size();
    const bool first = at == task.queries.begin, last = block.end == task.queries.end;
    const float* lse = a.lse + head * c.in.tokens + block.begin;
    const Rows q = words_of(c, rotated(c, c.in.q, head, block, w.staged), n, w.ld, w.q);
    const Rows d_out = words_of(c, rows_of(c, a.d_out, row, head, block), n, w.ld, w.d_out);
    if (wanted & kDkDv) {
      c.pack_a(q.transposed(), d, n, w.q_t);
      c.pack_a(d_out.transposed(), d, n, w.d_out_t);
    }
    simd.dot_rows(type, n, d, rows_of(c, a.d_out, row, head, block).data,
                  rows_of(c, a.out, row, head, block).data, row, w.delta);

    for (int64_t from = task.keys.begin; from < task.keys.end; from += group) {
      const Span keys = task.keys.part(from, group);
      // The first of the group's panels.
      const int64_t slot = wanted & kDkDv ? (from - task.keys.begin) / c.nr : 0;
      float* k_rows = w.k_rows + slot * w.panel_rows;
      // What comes next is asked for during the products.
      Ahead inputs, gradients, queries;
      if (first) {
        inputs = ask_for(c, c.in.k, c.in.v, c.in.row, head, task.keys.part(keys.end, group));
      } else if (last) {
        gradients = ask_for(c, a.grad.k, a.grad.v, a.grad.row, head, keys);
      }
      if (keys.end == task.keys.end) {
        const Span next = task.queries.part(block.end, kQueryBlock);
        inputs = ask_for(c, c.in.q, nullptr, c.in.row, head, next);
        queries = ask_for(c, a.d_out, a.out, row, head, next);
      }
      if (first) {
        const Rows k = rotated(c, c.in.k, head, keys, w.staged);
        c.pack_b(k, keys.size(), d, w.k + slot * c.nr * c.depth(d));
        c.pack_b(rows_of(c, c.in.v, c.in.row, head, keys), keys.size(), d,
                 w.v + slot * c.nr * c.depth(d));
        if (wanted & kDq) c.pack_b(k.transposed(), d, keys.size(), k_rows);
      }
      for (int64_t p = 0; p < c.panels(keys.size()); ++p) {
        const int64_t key = keys.begin + p * c.nr, count = std::min<int64_t>(keys.end - key, c.nr);
        const int64_t lanes = c.lanes(count), panel = (slot + p) * c.nr * c.depth(d);
        RowsProduct product = {.m = n,
                               .n = lanes,
                               .k = d,
                               .a = w.q,
                               .lda = w.ld,
                               .b = w.k + panel,
                               .ldb = c.nr,
                               .c = w.s,
                               .ldc = c.nr,
                               .ahead = &inputs};
        simd.gemm_rows(c.pairs, product);
        product.a = w.d_out;
        product.b = w.v + panel;
        product.c = w.d_s;
        simd.gemm_rows(c.pairs, product);
        simd.softmax_backward(c.pairs, n, c.nr, count, c.scale, lse, w.delta, w.s, w.d_s,
                              wanted & kDq ? w.d_s_rows + p * c.depth(c.nr) : nullptr, w.ld_s);
        if (wanted & kDkDv) {
          float *d_k = w.d_k + (slot + p) * w.panel, *d_v = w.d_v + (slot + p) * w.panel;
          c.multiply(d, lanes, n, w.d_out_t, w.s, d_v, c.nr, !first, &queries);
          c.multiply(d, lanes, n, w.q_t, w.d_s, d_k, c.nr, !first, &gradients);
          if (last) {
            const int64_t to = (key * a.grad.row + head * d) * c.size(), turn = key * d;
            store_columns(c, d_k, count, w.s, a.grad.k + to, a.grad.row,
                          c.cos ? c.cos + turn : nullptr, c.cos ? c.sin + turn : nullptr);
            store_columns(c, d_v, count, w.s, a.grad.v + to, a.grad.row, nullptr, nullptr);
          }
        }
      }
      if (wanted & kDq)
        simd.gemm_rows(c.pairs, {.m = n,
                                 .n = d,
                                 .k = keys.size(),
                                 .a = w.d_s_rows,
                                 .lda = w.ld_s,
                                 .b = k_rows,
                                 .ldb = c.nr,
                                 .c = w.d_q,
                                 .ldc = d,
                                 .accumulate = from > task.keys.begin});
    }

    if (wanted & kDq)
      for (int64_t t = 0; t < n; ++t) {
        float* line = w.d_q + t * d;
        const int64_t token = block.begin + t;
        if (c.cos) simd.rotate_half(line, c.cos + token * d, c.sin + token * d, d / 2, true, line);
        simd.from_f32(type, line, a.grad.q + (token * a.grad.row + head * d) * c.size(), d);
      }
  }
}

struct Mass {
  float *staged, *q, *k, *s, *mass;
  Mass(const Call& c, Room& room) {
    const int64_t d = c.in.head_dim, rows = round_up(kQueryBlock, c.mr);
    staged = room.take(kKeyChunk * d);
    q = room.take(rows * d);
    k = room.take(round_up(kKeyChunk, c.nr) * c.depth(d));
    s = room.take(rows * c.nr);
    mass = room.take(round_up(kKeyChunk, c.nr));
  }
};

void mass(const Call& c, const Mass& w, const Task& task, int64_t head, const float* lse,
          float* out) {
  const Simd& simd = *c.simd;
  const int64_t d = c.in.head_dim, keys = task.keys.size(), panels = c.panels(keys);
  c.pack_b(rotated(c, c.in.k, head, task.keys, w.staged), keys, d, w.k);
  std::fill_n(w.mass, panels * c.nr, 0.0f);
  for (int64_t at = task.queries.begin; at < task.queries.end; at += kQueryBlock) {
    const Span block = task.queries.part(at, kQueryBlock);
    c.pack_a(rotated(c, c.in.q, head, block, w.staged), block.size(), d, w.q);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t lanes = c.lanes(keys - p * c.nr);
      c.multiply(block.size(), lanes, d, w.q, w.k + p * c.nr * c.depth(d), w.s, c.nr, false);
      simd.softmax_mass(block.size(), c.nr, lanes, c.scale, lse + head * c.in.tokens + block.begin,
                        w.s, w.mass + p * c.nr);
    }
  }
  std::copy_n(w.mass, keys, out + head * c.in.tokens + task.keys.begin);
}

// Queues f(task, head, memory, next) for every task and head, with `floats` of memory a thread;
// `next` is what most likely comes next to this thread, if all keep pace.
template <class F>
void each_task(CpuDevice& cpu, const Call& c, std::vector<Task> tasks, int64_t floats, F f) {
  const int64_t items = static_cast<int64_t>(tasks.size()) * c.in.heads;
  if (!items) return;
  double work = 0;
  for (const Task& t : tasks) work += t.work() * 2 * c.in.head_dim;
  const double average = work / static_cast<double>(tasks.size());
  const int64_t most = std::max<int64_t>(1, items / (4 * cpu.threads()));
  const int64_t grain = std::clamp<int64_t>(static_cast<int64_t>(kTaskWork / average), 1, most);
  const Scratch scratch = cpu.scratch(floats * sizeof(float) * cpu.threads());
  float* memory = scratch.as<float>();
  cpu.launch(items, grain,
             [=, heads = c.in.heads, others = (cpu.threads() - 1) * grain,
              tasks = std::move(tasks)](int64_t begin, int64_t end, int thread) {
               for (int64_t i = begin; i < end; ++i) {
                 const int64_t next = i + 1 < end ? i + 1 : end + others;
                 f(tasks[i / heads], i % heads, memory + thread * floats,
                   Item{next < items ? &tasks[next / heads] : nullptr, next % heads});
               }
             });
}

template <class Layout, class... Arguments>
int64_t floats_of(const Call& c, Arguments... arguments) {
  Room room(nullptr);
  Layout(c, room, arguments...);
  return room.used();
}

}  // namespace

void attention(const AttentionArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const Call c(cpu, attention_layout(a.q, a.k, a.v, a.qkv), a.cos, a.sin, a.scale);
  int64_t most = kMostQueries, longest = 0, longest_short = 0;
  for (size_t i = 1; i < a.cu_seqlens.size(); ++i) {
    const int64_t keys = a.cu_seqlens[i] - a.cu_seqlens[i - 1];
    int64_t& so_far = c.is_short(keys) ? longest_short : longest;
    so_far = std::max(so_far, keys);
  }
  std::vector<Task> tasks = cut_up(a.cu_seqlens, Cut::queries, most);
  while (most > kFewestQueries &&
         static_cast<int64_t>(tasks.size()) * c.in.heads < 4 * cpu.threads())
    tasks = cut_up(a.cu_seqlens, Cut::queries, most /= 2);
  const int64_t room_for = std::min(most, longest);
  const int64_t floats =
      std::max(floats_of<Forward>(c, room_for), floats_of<Short>(c, longest_short));
  each_task(cpu, c, std::move(tasks), floats,
            [c, room_for, longest_short, out = a.out.as<char>(), lse = a.lse.as<float>()](
                const Task& task, int64_t head, float* memory, const Item& next) {
              Room room(memory);
              if (c.is_short(task.keys.size()))
                forward_short(c, Short(c, room, longest_short), task, head, next, out, lse);
              else
                forward(c, Forward(c, room, room_for), task, head, next, out, lse);
            });
}

void attention_backward(const AttentionBackwardArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const Call c(cpu, attention_layout(a.q, a.k, a.v, a.qkv), a.cos, a.sin, a.scale);
  const Answer answer{a.d_out.as<char>(), a.out.as<char>(), a.lse.as<float>(),
                      attention_layout(a.d_q, a.d_k, a.d_v, a.d_qkv)};
  const auto pass = [&](int wanted, std::vector<Task> tasks, int64_t keys) {
    each_task(cpu, c, std::move(tasks), floats_of<Backward>(c, wanted, keys),
              [=](const Task& task, int64_t head, float* memory, const Item&) {
                Room room(memory);
                backward(c, Backward(c, room, wanted, keys), wanted, task, head, answer);
              });
  };
  // Each sequence goes one way.
  const int64_t d = std::max<int64_t>(c.in.head_dim, 1);
  const int64_t whole = std::min(kWhole / (4 * d + round_up(d, c.nr)), kWholeTokens);
  std::vector<Task> one, by_keys, by_queries;
  for (const Task& t : cut_up(a.cu_seqlens, Cut::queries, INT64_MAX / 2))
    if (t.keys.size() <= whole) one.push_back(t);
  for (const Task& t : cut_up(a.cu_seqlens, Cut::keys, kKeyChunk))
    if (t.queries.size() > whole) by_keys.push_back(t);
  for (const Task& t : cut_up(a.cu_seqlens, Cut::queries, kQueryBlock))
    if (t.keys.size() > whole) by_queries.push_back(t);
  int64_t longest = 0;
  for (const Task& t : one) longest = std::max(longest, t.keys.size());
  pass(kDq | kDkDv, std::move(one), longest);
  pass(kDkDv, std::move(by_keys), kKeyChunk);
  pass(kDq, std::move(by_queries), 0);
}

void attention_mass(const AttentionMassArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const Call c(cpu, attention_layout(a.q, a.k, View(), a.qkv), a.cos, a.sin, a.scale);
  each_task(cpu, c, cut_up(a.cu_seqlens, Cut::keys, kKeyChunk), floats_of<Mass>(c),
            [c, lse = a.lse.as<float>(), out = a.mass.as<float>()](const Task& task, int64_t head,
                                                                   float* memory, const Item&) {
              Room room(memory);
              mass(c, Mass(c, room), task, head, lse, out);
            });
}

}  // namespace p2r::cpu

// Forward attention of sequences so short that a query panel's row of P stays in L1: no online
// softmax, and operands are read in place where they can be. For a sequence and a head, for each
// panel of NR queries, or two:
//
//   S^T = K Q^T                         [keys][NR]: K is read in place
//   P^T = exp(S^T - max)                all keys at once
//   out = P V / sum                     [NR][D]: P^T, V and out are read and written in place
//
// Only Q is packed; V is copied unless its rows are whole cache lines of f32. Short windows are
// memory-bound (a window of 64 tokens is loaded and stored in the time of its products): the next
// window's rows are prefetched line by line, and large outputs use non-temporal stores.
#include "cpu/attention/attention.h"

namespace p2r::cpu::attention_kernels {

namespace {

constexpr int64_t kMaxShortDepth = 256;   // words of a row of P
constexpr int64_t kMaxTwoPanelKeys = 64;  // two panels of P stay in L1 beside K and V
constexpr int64_t kNontemporalBytes = int64_t{32} << 20;  // an output larger than the caches

// Whether the rows of V are whole cache lines of words: parts of lines would be loaded twice, and
// stored to memory in parts.
bool reads_in_place(const Call& c) { return c.in.dtype == DType::f32 && c.in.head_dim % 16 == 0; }

// Whether outputs are stored non-temporally: more than the caches hold, and in whole vectors, which
// are cache lines of f32 and halves of lines of bf16.
bool stores_nontemporal(const Call& c, const char* out) {
  return c.writes_in_place() && c.in.head_dim % 16 == 0 &&
         c.in.tokens * c.out_row() * c.size() > kNontemporalBytes &&
         reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

// Prefetches the rows of the next task, if it is a short sequence too, and those of `out`, unless
// it is null.
Prefetch prefetch_next(const Call& c, const HeadTask& next, const char* out) {
  if (!next.task || !is_short(c, next.task->keys.size())) return {};
  Prefetch p = prefetch_rows(c, c.in.q, c.in.k, c.in.row, next.head, next.task->keys);
  p.third = c.in.v - c.in.q;
  if (out) {
    const int64_t row = c.out_row();
    p.output = prefetch_rows(c, out, nullptr, row, next.head, next.task->queries).line;
    p.output_skip = row * c.size() - 64 * p.lines;
  }
  return p;
}

}  // namespace

bool is_short(const Call& c, int64_t keys) { return c.depth(keys) <= kMaxShortDepth; }

ForwardBuffers short_forward_buffers(const Call& c, Workspace& workspace, int64_t max_tokens) {
  const int64_t d = c.in.head_dim;
  const auto take = [&](int64_t floats) { return workspace.take<float>(floats); };
  ForwardBuffers w;
  w.rotated = take(c.cos ? max_tokens * d : 0);
  w.q = take(round_up(max_tokens, c.nr) * c.depth(d));
  w.k = take(c.in.dtype != DType::f32 && !c.pairs ? max_tokens * d : 0);
  w.v = take(reads_in_place(c) ? 0 : c.depth(max_tokens) * c.value_stride());
  w.s = take(std::max(max_tokens, 2 * kMaxTwoPanelKeys) * c.nr);
  w.o = take(c.writes_in_place() ? 0 : 2 * c.nr * d);
  w.max = take(2 * c.nr);
  w.sum = take(2 * c.nr);
  w.lse = take(2 * c.nr);
  w.rescale = w.inverse_sum = take(2 * c.nr);  // the rescale factor is not needed
  return w;
}

void forward_short(const Call& c, const ForwardBuffers& w, const Task& task, int64_t head,
                   const HeadTask& next, char* out, float* lse) {
  const Simd& simd = *c.simd;
  const int64_t d = c.in.head_dim, keys = task.keys.size(), queries = task.queries.size();
  const int64_t row = c.out_row(), panels = keys <= kMaxTwoPanelKeys ? 2 : 1;
  const int64_t group = std::min(panels * c.nr, round_up(queries, c.nr));
  lse += head * c.in.tokens + task.queries.begin;
  // A store that misses the cache would hold up those behind it.
  for (int64_t t = 0; t < queries; t += 16) __builtin_prefetch(lse + t, 1);
  c.pack_b(rotated_rows(c, c.in.q, head, task.queries, w.rotated), queries, d, w.q);
  Rows k = rotated_rows(c, c.in.k, head, task.keys, w.rotated);
  if (c.in.dtype != DType::f32 && !c.pairs) k = to_words(c, k, keys, d, w.k);
  const bool v_in_place = reads_in_place(c), out_in_place = c.writes_in_place();
  const bool nontemporal = stores_nontemporal(c, out);
  const Rows v = rows_of(c, c.in.v, c.in.row, head, task.keys);
  if (!v_in_place) value_words(c, v, keys, c.value_stride(), w.v);
  Prefetch ahead = prefetch_next(c, next, nontemporal ? nullptr : out);
  out += (task.queries.begin * row + head * d) * c.size();
  set_interval(ahead, prefetch_slots(simd, keys, queries, c.depth(d)) +
                          c.panels(queries) * prefetch_slots(simd, c.nr, d, c.depth(keys)));

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
                             .prefetch = &ahead});
    std::fill_n(w.max, lanes, c.initial_max());
    std::fill_n(w.sum, lanes, 0.0f);
    simd.softmax_update(c.pairs, keys, group, lanes, c.scale, w.s, w.max, w.sum, w.rescale);
    simd.softmax_finalize(lanes, c.scale, w.max, w.sum, w.lse, w.inverse_sum);
    std::copy_n(w.lse, n, lse + first);
    char* to = out + first * row * c.size();
    simd.gemm_rows(c.pairs, {.m = n,
                             .n = d,
                             .k = keys,
                             .a = w.s,
                             .lda = group,
                             .b = v_in_place ? static_cast<const float*>(v.data) : w.v,
                             .ldb = v_in_place ? v.stride : c.value_stride(),
                             .c = w.o,
                             .ldc = d,
                             .a_transposed = true,
                             .row_scale = w.inverse_sum,
                             .out = out_in_place ? to : nullptr,
                             .ld_out = row,
                             .nontemporal = nontemporal,
                             .prefetch = &ahead});
    for (int64_t r = 0; r < n && !out_in_place; ++r)
      simd.from_f32(c.in.dtype, w.o + r * d, to + r * row * c.size(), d);
  }
}

}  // namespace p2r::cpu::attention_kernels

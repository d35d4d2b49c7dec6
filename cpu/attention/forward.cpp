// Forward attention of sequences of any length, by the online softmax. For a sequence, a head and a
// task's queries:
//
//   for each block of keys
//     for each panel of NR queries      S^T = K Q^T        [keys][NR]: a query per lane
//       P^T = exp(S^T - max)            in place; max and sum are updated
//       O = O rescale + P V             [NR][D]; P^T is read as a transposed A
//   out = O / sum                       in the epilogue of the last of these products
//
// Lanes are independent, so how the queries are cut into tasks may depend on the number of threads.
// The rows of the next block, or of the next task, are prefetched during the products.
#include "cpu/attention/attention.h"

namespace p2r::cpu::attention_kernels {

ForwardBuffers forward_buffers(const Call& c, Workspace& workspace, int64_t max_queries) {
  const int64_t d = c.in.head_dim, queries = round_up(max_queries, c.nr);
  const auto take = [&](int64_t floats) { return workspace.take<float>(floats); };
  ForwardBuffers w;
  w.rotated = take(c.cos ? std::max(max_queries, kKeyBlock) * d : 0);
  w.q = take(queries * c.depth(d));
  w.k = take(round_up(kKeyBlock, c.mr) * c.depth(d));
  w.v = take(c.depth(kKeyBlock) * c.value_stride());
  w.s = take(kKeyBlock * c.nr);
  w.o = take(max_queries * d);
  w.max = take(queries);
  w.sum = take(queries);
  w.rescale = take(c.nr);
  w.lse = take(c.nr);
  w.inverse_sum = take(c.nr);
  return w;
}

void forward(const Call& c, const ForwardBuffers& w, const Task& task, int64_t head,
             const HeadTask& next, char* out, float* lse) {
  const Simd& simd = *c.simd;
  const int64_t d = c.in.head_dim, queries = task.queries.size(), row = c.out_row();
  c.pack_b(rotated_rows(c, c.in.q, head, task.queries, w.rotated), queries, d, w.q);
  std::fill_n(w.max, round_up(queries, c.nr), c.initial_max());
  std::fill_n(w.sum, round_up(queries, c.nr), 0.0f);

  for (int64_t key = task.keys.begin; key < task.keys.end; key += kKeyBlock) {
    const Span block = task.keys.part(key, kKeyBlock);
    const bool first = key == task.keys.begin, last = block.end == task.keys.end;
    Prefetch keys_ahead, queries_ahead;
    if (!last) {
      keys_ahead =
          prefetch_rows(c, c.in.k, c.in.v, c.in.row, head, task.keys.part(block.end, kKeyBlock));
    } else if (next.task) {
      const Span all = next.task->keys;
      keys_ahead =
          prefetch_rows(c, c.in.k, c.in.v, c.in.row, next.head, all.part(all.begin, kKeyBlock));
      queries_ahead = prefetch_rows(c, c.in.q, nullptr, c.in.row, next.head, next.task->queries);
    }
    set_interval(keys_ahead, prefetch_slots(simd, block.size(), queries, c.depth(d)));
    set_interval(queries_ahead,
                 c.panels(queries) * prefetch_slots(simd, c.nr, d, c.depth(block.size())));
    c.pack_a(rotated_rows(c, c.in.k, head, block, w.rotated), block.size(), d, w.k);
    value_words(c, rows_of(c, c.in.v, c.in.row, head, block), block.size(), c.value_stride(), w.v);
    for (int64_t from = 0; from < queries; from += c.nr) {
      const int64_t n = std::min<int64_t>(queries - from, c.nr), lanes = c.lanes(n);
      const int64_t token = task.queries.begin + from;
      float* o = w.o + from * d;
      c.multiply(block.size(), lanes, d, w.k, w.q + from * c.depth(d), w.s, c.nr, false,
                 &keys_ahead);
      const bool rescaled = simd.softmax_update(c.pairs, block.size(), c.nr, lanes, c.scale, w.s,
                                                w.max + from, w.sum + from, w.rescale);
      if (rescaled && !first) simd.scale_rows(n, d, w.rescale, o);
      if (last) {
        simd.softmax_finalize(lanes, c.scale, w.max + from, w.sum + from, w.lse, w.inverse_sum);
        std::copy_n(w.lse, n, lse + head * c.in.tokens + token);
      }
      simd.gemm_rows(c.pairs, {.m = n,
                               .n = d,
                               .k = block.size(),
                               .a = w.s,
                               .lda = c.nr,
                               .b = w.v,
                               .ldb = c.value_stride(),
                               .c = o,
                               .ldc = d,
                               .a_transposed = true,
                               .accumulate = !first,
                               .row_scale = last ? w.inverse_sum : nullptr,
                               .prefetch = &queries_ahead});
      for (int64_t r = 0; r < n && last; ++r)
        simd.from_f32(c.in.dtype, o + r * d, out + ((token + r) * row + head * d) * c.size(), d);
    }
  }
}

}  // namespace p2r::cpu::attention_kernels

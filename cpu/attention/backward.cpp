// The gradient of attention, for the queries and keys of a task, of a sequence and a head:
//
//   for each block of queries
//     for each group of panels of NR keys
//       for each of its panels          S = Q K^T, dP = dO V^T   [queries][NR]: a key per lane
//         P = exp(S - lse), dS          in place, and dS once more row-major for the whole group
//         dV^T += dO^T P, dK^T += Q^T dS  [D][NR]; P and dS are packed panels of B already
//       dQ += dS K                      all keys of the group at once
//
// Q, dO and the row-major dS of dQ are not packed: they are read as rows. The rows of the next
// group and block, and those that the gradients will be written to, are prefetched during the
// products.
//
// A sequence short enough for its sums to stay in the cache is one task a head. A longer one is cut
// twice, along the keys for dK and dV and along the queries for dQ: seven products instead of five,
// but no sum crosses tasks. Which of the two depends on the length and D alone.
#include "cpu/attention/attention.h"

namespace p2r::cpu::attention_kernels {

namespace {

constexpr int64_t kGroupPanels = 4;  // panels of keys of one product for dQ
// Floats of K, V, K^T, dK and dV of one task; and its longest sequence: longer ones as one task
// would leave threads idle.
constexpr int64_t kMaxSingleTaskFloats = 832 * 1024, kMaxSingleTaskTokens = 2304;

}  // namespace

int64_t max_single_task_tokens(const Call& c) {
  const int64_t d = std::max<int64_t>(c.in.head_dim, 1);
  return std::min(kMaxSingleTaskFloats / (4 * d + round_up(d, c.nr)), kMaxSingleTaskTokens);
}

BackwardBuffers::BackwardBuffers(const Call& c, Workspace& workspace, int gradients, int64_t keys) {
  const int64_t d = c.in.head_dim, rows = round_up(kQueryBlock, c.mr);
  const auto take = [&](int64_t floats) { return workspace.take<float>(floats); };
  // Not powers of two, as for value_stride.
  query_stride = c.depth(d) + 16;
  d_s_stride = c.depth(kGroupPanels * c.nr) + 16;
  q = take(kQueryBlock * query_stride);
  q_t = take(round_up(d, c.mr) * c.depth(kQueryBlock));
  d_out = take(kQueryBlock * query_stride);
  d_out_t = take(round_up(d, c.mr) * c.depth(kQueryBlock));
  delta = take(kQueryBlock);
  s = take(rows * c.nr);
  d_s = take(rows * c.nr);
  // These share memory: rotated rows are packed before there is a dS.
  const int64_t rotated_floats =
      c.cos ? std::max<int64_t>(kQueryBlock, kGroupPanels * c.nr) * d : 0;
  d_s_rows = rotated = take(std::max(gradients & kDq ? rows * d_s_stride : 0, rotated_floats));
  d_q = take(gradients & kDq ? kQueryBlock * d : 0);
  panel_floats = c.nr * d;
  k_rows_floats = c.depth(c.nr) * round_up(d, c.nr);
  const int64_t panels = gradients & kDkDv ? c.panels(keys) : kGroupPanels;
  k = take(panels * c.depth(d) * c.nr);
  v = take(panels * c.depth(d) * c.nr);
  k_rows = take(gradients & kDq ? panels * k_rows_floats : 0);
  d_k = take(gradients & kDkDv ? panels * panel_floats : 0);
  d_v = take(gradients & kDkDv ? panels * panel_floats : 0);
}

void backward(const Call& c, const BackwardBuffers& w, int gradients, const Task& task,
              int64_t head, const BackwardTensors& t) {
  const Simd& simd = *c.simd;
  const DType type = c.in.dtype;
  const int64_t d = c.in.head_dim, row = c.out_row(), group = kGroupPanels * c.nr;

  for (int64_t query = task.queries.begin; query < task.queries.end; query += kQueryBlock) {
    const Span block = task.queries.part(query, kQueryBlock);
    const int64_t n = block.size();
    const bool first = query == task.queries.begin, last = block.end == task.queries.end;
    const float* lse = t.lse + head * c.in.tokens + block.begin;
    const Rows q =
        to_words(c, rotated_rows(c, c.in.q, head, block, w.rotated), n, w.query_stride, w.q);
    const Rows d_out =
        to_words(c, rows_of(c, t.d_out, row, head, block), n, w.query_stride, w.d_out);
    if (gradients & kDkDv) {
      c.pack_a(q.transposed(), d, n, w.q_t);
      c.pack_a(d_out.transposed(), d, n, w.d_out_t);
    }
    simd.dot_rows(type, n, d, rows_of(c, t.d_out, row, head, block).data,
                  rows_of(c, t.out, row, head, block).data, row, w.delta);

    for (int64_t from = task.keys.begin; from < task.keys.end; from += group) {
      const Span keys = task.keys.part(from, group);
      // The first of the group's panels in the buffers.
      const int64_t first_panel = gradients & kDkDv ? (from - task.keys.begin) / c.nr : 0;
      float* k_rows = w.k_rows + first_panel * w.k_rows_floats;
      Prefetch inputs_ahead, gradients_ahead, queries_ahead;
      if (first) {
        inputs_ahead =
            prefetch_rows(c, c.in.k, c.in.v, c.in.row, head, task.keys.part(keys.end, group));
      } else if (last) {
        gradients_ahead = prefetch_rows(c, t.grad.k, t.grad.v, t.grad.row, head, keys);
      }
      if (keys.end == task.keys.end) {
        const Span next = task.queries.part(block.end, kQueryBlock);
        inputs_ahead = prefetch_rows(c, c.in.q, nullptr, c.in.row, head, next);
        queries_ahead = prefetch_rows(c, t.d_out, t.out, row, head, next);
      }
      if (first) {
        const Rows k = rotated_rows(c, c.in.k, head, keys, w.rotated);
        c.pack_b(k, keys.size(), d, w.k + first_panel * c.nr * c.depth(d));
        c.pack_b(rows_of(c, c.in.v, c.in.row, head, keys), keys.size(), d,
                 w.v + first_panel * c.nr * c.depth(d));
        if (gradients & kDq) c.pack_b(k.transposed(), d, keys.size(), k_rows);
      }
      for (int64_t p = 0; p < c.panels(keys.size()); ++p) {
        const int64_t key = keys.begin + p * c.nr, count = std::min<int64_t>(keys.end - key, c.nr);
        const int64_t lanes = c.lanes(count), panel = (first_panel + p) * c.nr * c.depth(d);
        RowGemm product = {.m = n,
                           .n = lanes,
                           .k = d,
                           .a = w.q,
                           .lda = w.query_stride,
                           .b = w.k + panel,
                           .ldb = c.nr,
                           .c = w.s,
                           .ldc = c.nr,
                           .prefetch = &inputs_ahead};
        simd.gemm_rows(c.pairs, product);
        product.a = w.d_out;
        product.b = w.v + panel;
        product.c = w.d_s;
        simd.gemm_rows(c.pairs, product);
        simd.softmax_backward(c.pairs, n, c.nr, count, c.scale, lse, w.delta, nullptr, w.s, w.d_s,
                              gradients & kDq ? w.d_s_rows + p * c.depth(c.nr) : nullptr,
                              w.d_s_stride);
        if (gradients & kDkDv) {
          float* d_k = w.d_k + (first_panel + p) * w.panel_floats;
          float* d_v = w.d_v + (first_panel + p) * w.panel_floats;
          c.multiply(d, lanes, n, w.d_out_t, w.s, d_v, c.nr, !first, &queries_ahead);
          c.multiply(d, lanes, n, w.q_t, w.d_s, d_k, c.nr, !first, &gradients_ahead);
          if (last) {
            const int64_t to = (key * t.grad.row + head * d) * c.size(), angles = key * d;
            store_transposed(c, d_k, count, w.s, t.grad.k + to, t.grad.row,
                             c.cos ? c.cos + angles : nullptr, c.cos ? c.sin + angles : nullptr);
            store_transposed(c, d_v, count, w.s, t.grad.v + to, t.grad.row, nullptr, nullptr);
          }
        }
      }
      if (gradients & kDq)
        simd.gemm_rows(c.pairs, {.m = n,
                                 .n = d,
                                 .k = keys.size(),
                                 .a = w.d_s_rows,
                                 .lda = w.d_s_stride,
                                 .b = k_rows,
                                 .ldb = c.nr,
                                 .c = w.d_q,
                                 .ldc = d,
                                 .accumulate = from > task.keys.begin});
    }

    if (gradients & kDq)
      for (int64_t i = 0; i < n; ++i) {
        float* values = w.d_q + i * d;
        const int64_t token = block.begin + i, angles = token * d;
        if (c.cos) simd.rotate_half(values, c.cos + angles, c.sin + angles, d / 2, true, values);
        simd.from_f32(type, values, t.grad.q + (token * t.grad.row + head * d) * c.size(), d);
      }
  }
}

}  // namespace p2r::cpu::attention_kernels

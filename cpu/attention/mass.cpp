// Attention mass: mass[key] = sum over queries of P, with P = exp(scale Q K^T - lse). A task owns
// some keys of a sequence and a head, and adds up all its queries:
//
//   for each block of queries
//     for each panel of NR keys           S = Q K^T   [queries][NR]: a key per lane
//       mass += column sums of exp(S - lse)
#include "cpu/attention/attention.h"

namespace p2r::cpu::attention_kernels {

MassBuffers::MassBuffers(const Call& c, Workspace& workspace) {
  const int64_t d = c.in.head_dim, rows = round_up(kQueryBlock, c.mr);
  rotated = workspace.take<float>(kTaskKeys * d);
  q = workspace.take<float>(rows * d);
  k = workspace.take<float>(round_up(kTaskKeys, c.nr) * c.depth(d));
  s = workspace.take<float>(rows * c.nr);
  mass = workspace.take<float>(round_up(kTaskKeys, c.nr));
}

void mass(const Call& c, const MassBuffers& w, const Task& task, int64_t head, const float* lse,
          float* out) {
  const Simd& simd = *c.simd;
  const int64_t d = c.in.head_dim, keys = task.keys.size(), panels = c.panels(keys);
  c.pack_b(rotated_rows(c, c.in.k, head, task.keys, w.rotated), keys, d, w.k);
  std::fill_n(w.mass, panels * c.nr, 0.0f);
  for (int64_t query = task.queries.begin; query < task.queries.end; query += kQueryBlock) {
    const Span block = task.queries.part(query, kQueryBlock);
    c.pack_a(rotated_rows(c, c.in.q, head, block, w.rotated), block.size(), d, w.q);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t lanes = c.lanes(keys - p * c.nr);
      c.multiply(block.size(), lanes, d, w.q, w.k + p * c.nr * c.depth(d), w.s, c.nr, false);
      simd.softmax_mass(block.size(), c.nr, lanes, c.scale, lse + head * c.in.tokens + block.begin,
                        w.s, w.mass + p * c.nr);
    }
  }
  std::copy_n(w.mass, keys, out + head * c.in.tokens + task.keys.begin);
}

}  // namespace p2r::cpu::attention_kernels

// Logits of a linear head, a block of the vocabulary at a time, and their softmax sums.
#include "cpu/linear_log_probs/linear_log_probs.h"

namespace p2r::cpu::linear_head {

void Head::take_buffers(Workspace& workspace, const CpuDevice& cpu, bool sums) {
  active_rows = workspace.take<int64_t>(chunk_rows);
  panels = workspace.take<float>(padded_rows() * depth(channels));
  words = workspace.take<float>(cpu.threads() * word_floats());
  logits = workspace.take<float>(cpu.threads() * logit_floats());
  if (!sums) return;
  partials = workspace.take<float>(chunk_rows * spans * 3);
  running = workspace.take<float>(cpu.threads() * 4 * cpu.simd().vector_width() * pitch);
  target_logit = workspace.take<float>(chunk_rows);
}

void pack_hidden(CpuDevice& cpu, const Head& h, int64_t active) {
  int mr, nr;
  cpu.simd().gemm_tile_size(&mr, &nr);
  cpu.parallel(ceil_div(active, nr), 1, [&](int64_t begin, int64_t end, int) {
    const Simd& simd = cpu.simd();
    float rows[kMaxPanelRows * 2 * kBlockK];
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * nr, n = std::min<int64_t>(nr, active - first);
      for (int64_t k0 = 0; k0 < h.channels; k0 += h.block_k()) {
        const int64_t k = std::min(h.block_k(), h.channels - k0);
        for (int64_t r = 0; r < n; ++r)
          simd.to_f32(h.hidden.dtype, h.hidden.element(h.active_rows[first + r] * h.channels + k0),
                      rows + r * k, k);
        simd.pack_b(h.pairs, DType::f32, rows, 1, k, k, n,
                    h.panels + h.depth(k0) * h.padded_rows() + first * h.depth(k));
      }
    }
  });
}

namespace {

// The weight's rows first .. first + n as panel words, depth(channels) apart.
const float* weight_words(const Simd& simd, const Head& h, int64_t first, int64_t n,
                          float* buffer) {
  const char* rows = h.weight.element(first * h.channels);
  if (h.weight_in_place) return reinterpret_cast<const float*>(rows);
  to_panel_words(simd, h.pairs, h.weight.dtype, rows, h.channels, n, h.channels, buffer,
                 h.depth(h.channels));
  return buffer;
}

}  // namespace

namespace {

// The logits of at most `block` columns.
void compute_block(const Simd& simd, const Head& h, int64_t active, int64_t first, int64_t n,
                   float* buffer, float* logits) {
  int mr, nr;
  simd.gemm_tile_size(&mr, &nr);
  const float* words = weight_words(simd, h, first, n, buffer);
  const int64_t lanes = round_up(active, simd.vector_width()), depth = h.depth(h.channels);
  float bias[kSoftmaxColumns];
  if (h.bias) simd.to_f32(h.bias.dtype, h.bias.element(first), bias, n);
  if (h.bias || h.channels == 0)
    for (int64_t j = 0; j < n; ++j) std::fill_n(logits + j * h.pitch, lanes, h.bias ? bias[j] : 0);
  // The next block of the weight, mostly this thread's own next one, is prefetched meanwhile.
  const int64_t next = first + n, size = h.channels * static_cast<int64_t>(size_of(h.weight.dtype));
  Prefetch ahead;
  ahead.line = h.weight.element(next * h.channels);
  ahead.lines_left = ahead.lines = std::max<int64_t>(std::min(n, h.columns - next), 0) * size / 64;
  ahead.rows = ahead.lines > 0;
  set_interval(ahead, prefetch_slots(simd, n, lanes, depth));
  const int64_t block_k = h.block_k();
  for (int64_t k0 = 0; k0 < h.channels; k0 += block_k)
    simd.gemm_rows(h.pairs, {.m = n,
                             .n = lanes,
                             .k = std::min(block_k, h.channels - k0),
                             .a = words + h.depth(k0),
                             .lda = depth,
                             .b = h.panels + h.depth(k0) * h.padded_rows(),
                             .ldb = nr,
                             .c = logits,
                             .ldc = h.pitch,
                             .accumulate = h.bias || k0,
                             .prefetch = &ahead});
}

}  // namespace

const float* compute_logits(const Simd& simd, const Head& h, int64_t active, int64_t first,
                            int64_t n, int thread) {
  float* logits = h.logits + thread * h.logit_floats();
  float* buffer = h.words + thread * h.word_floats();
  for (int64_t j = 0; j < n; j += h.block)
    compute_block(simd, h, active, first + j, std::min(h.block, n - j), buffer,
                  logits + j * h.pitch);
  return logits;
}

void sum_spans(CpuDevice& cpu, const Head& h, int64_t active, float* chunk) {
  cpu.parallel(h.spans, 1, [&](int64_t begin, int64_t end, int thread) {
    const Simd& simd = cpu.simd();
    const int64_t lanes = round_up(active, simd.vector_width());
    const int64_t runs = simd.vector_width();
    float* running = h.running + thread * 4 * runs * h.pitch;
    for (int64_t s = begin; s < end; ++s) {
      std::fill_n(running, 2 * runs * h.pitch, static_cast<float>(-kInfinity));
      std::fill_n(running + 2 * runs * h.pitch, 2 * runs * h.pitch, 0.0f);
      const int64_t stop = std::min(h.columns, (s + 1) * h.span);
      for (int64_t first = s * h.span; first < stop; first += kSoftmaxColumns) {
        const int64_t n = std::min(kSoftmaxColumns, stop - first);
        const float* logits = compute_logits(simd, h, active, first, n, thread);
        simd.softmax_lanes(n, h.pitch, lanes, static_cast<float>(h.inverse), h.extra, logits,
                           running);
        for (int64_t i = 0; i < active; ++i) {
          const int64_t label = h.target(i) - first;
          if (label >= 0 && label < n) h.target_logit[i] = logits[label * h.pitch + i];
        }
        if (chunk) simd.transpose(n, active, logits, h.pitch, chunk + first, h.columns);
      }
      for (int64_t i = 0; i < active; ++i)
        simd.softmax_runs(h.pitch, static_cast<float>(h.inverse), h.extra, running + i,
                          h.partials + (i * h.spans + s) * 3);
    }
  });
}

void store_logits(CpuDevice& cpu, const Head& h, int64_t active, float* chunk) {
  cpu.parallel(ceil_div(h.columns, h.block), 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * h.block, n = std::min(h.block, h.columns - first);
      cpu.simd().transpose(n, active, compute_logits(cpu.simd(), h, active, first, n, thread),
                           h.pitch, chunk + first, h.columns);
    }
  });
}

RowLogProb merge_spans(const Simd& simd, const Head& h, int64_t i) {
  return row_log_prob(
      cpu::merge_spans(simd, h.partials + i * h.spans * 3, h.spans, h.inverse, h.extra),
      h.target_logit[i], h.inverse, h.extra);
}

}  // namespace p2r::cpu::linear_head

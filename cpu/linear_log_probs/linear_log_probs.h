// What the kernels of a linear head's log-probabilities share, also with cpu/distillation.cpp: the
// head, how rows and vocabulary are cut, and the logits of a chunk of rows, which are computed
// where they are used.
//
//   linear_log_probs.cpp  the operations: forward, backward, and the policy loss through the head
//   logits.cpp            logits of a block of the vocabulary, and the rows' softmax sums
//   gradients.cpp         dz, and its three products: dhidden, dweight, dbias
//
// A thread multiplies a block of the weight's rows, read in place, by the packed hidden states of a
// chunk of rows, and passes on the block's logits while they are in the cache. They are
// [columns of the vocabulary][rows]: the weight, which is read once and is most of the memory
// traffic, needs no packing, and a row is a SIMD lane, so that its maximum and sums never cross
// lanes. For gradients the blocks are transposed as they are stored.
//
//   for each chunk of active rows, found by reading the targets:
//     pack their hidden states, for all threads
//     forward:   for each span of the vocabulary: for each block: logits -> the rows' running sums
//                merge every row's spans in order
//     backward:  for each part of the vocabulary: logits -> dz, in place; then three products of dz
//     the loss:  logits -> a chunk of them, and sums; the loss's gradient; dz in place; products
//
// How the vocabulary is cut depends on V and C alone, and how it is cut for the softmax's sums on V
// alone. A logit is the sum that `linear` has before it rounds (cpu/gemm.h).
#pragma once
#include <algorithm>

#include "cpu/gemm.h"
#include "cpu/log_probs.h"
#include "ops/integer.h"
#include "ops/linear_log_probs.h"

namespace p2r::cpu::linear_head {

constexpr int64_t kMaxPanelRows = 32;        // of the widest panel of hidden states
constexpr int64_t kColumnMultiple = 24;      // whole register tiles on every CPU
constexpr int64_t kBlockWords = 128 * 1024;  // of a block of the weight: 512 KiB of L2
constexpr int64_t kPanelWords = 768 * 1024;  // of packed hidden states: 3 MiB of L3
constexpr int64_t kMaxChunkRows = 768;
constexpr int64_t kChunkRowMultiple = 96;

// Whether a row takes part: its target is -100 (skipped) or outside the vocabulary (invalid), or
// its gradient is 0 (skipped).
enum class RowState { active, skipped, invalid };

// The linear head, how it is cut, and the buffers for one chunk of rows.
struct Head {
  In hidden, weight, bias, targets;
  int64_t rows, columns, channels;
  double inverse;  // 1 / temperature

  bool pairs;            // whether a word of the product holds two bf16
  bool weight_in_place;  // whether the weight's rows are such words as they are stored
  int64_t chunk_rows;
  int64_t pitch;  // of a block's logits; no power of two, which would map rows to the same L1 sets
  int64_t block;  // columns at once
  int64_t span, spans;
  SoftmaxExtra extra = SoftmaxExtra::none;  // of the sums

  int64_t* active_rows = nullptr;  // the chunk's
  float* panels = nullptr;         // their hidden states, packed
  float* words = nullptr;          // a block of the weight, per thread, unless weight_in_place
  float* logits = nullptr;         // of a block, per thread
  float* partials = nullptr;       // [chunk_rows, spans, 3]
  float* running = nullptr;        // [threads, 4, vector_width(), pitch]
  float* target_logit = nullptr;   // [chunk_rows]

  template <class Args>
  Head(const Args& a, const CpuDevice& cpu, int64_t max_rows)
      : hidden(a.hidden),
        weight(a.weight),
        bias(a.bias),
        targets(a.targets),
        rows(a.hidden.shape[0]),
        columns(a.weight.shape[0]),
        channels(a.weight.shape[1]),
        inverse(1 / a.temperature),
        pairs(uses_pairs(cpu, a.hidden.dtype, a.weight.dtype)),
        weight_in_place(a.weight.dtype == DType::f32 || (pairs && channels % 2 == 0)) {
    const int64_t words_per_row = std::max<int64_t>(depth(channels), 1);
    const int64_t fit =
        std::clamp(kPanelWords / words_per_row / kChunkRowMultiple * kChunkRowMultiple,
                   kChunkRowMultiple, kMaxChunkRows);
    chunk_rows = std::min({fit, std::max<int64_t>(rows, 1), max_rows});
    pitch = padded_rows() + 16;
    block = std::clamp(kBlockWords / words_per_row / kColumnMultiple * kColumnMultiple,
                       kColumnMultiple, kSoftmaxColumns);
    span = sum_span(columns);
    spans = ceil_div(columns, span);
  }
  // sums: whether sum_spans will be called.
  void take_buffers(Workspace& workspace, const CpuDevice& cpu, bool sums);

  int64_t padded_rows() const { return round_up(chunk_rows, kMaxPanelRows); }
  // Words of k channels, and the channels of a block of them.
  int64_t depth(int64_t k) const { return pairs ? ceil_div(k, 2) : k; }
  int64_t block_k() const { return sum_block(channels, pairs); }
  int64_t word_floats() const { return weight_in_place ? 0 : block * depth(channels); }
  int64_t logit_floats() const { return kSoftmaxColumns * pitch; }
  RowState state_of(int64_t row) const {
    const int32_t target = targets.as<int32_t>()[row];
    return target == kSkippedTarget          ? RowState::skipped
           : target < 0 || target >= columns ? RowState::invalid
                                             : RowState::active;
  }
  // The target of row i of the chunk.
  int32_t target(int64_t i) const { return targets.as<int32_t>()[active_rows[i]]; }
};

// Fills the chunk with the rows from `next` on for which state(row) is active; returns their
// number.
template <class F>
int64_t gather_rows(const Head& h, int64_t& next, const F& state) {
  int64_t active = 0;
  for (; next < h.rows && active < h.chunk_rows; ++next)
    if (state(next) == RowState::active) h.active_rows[active++] = next;
  return active;
}

// logits.cpp

// Packs the chunk's hidden states: block of k by block of k, each with the panels of all rows.
void pack_hidden(CpuDevice& cpu, const Head& h, int64_t active);
// The logits of the chunk's rows in columns first .. first + n, at most kSoftmaxColumns:
// [n][pitch], a row per lane; lanes past the last row, up to a whole vector, are undefined.
const float* compute_logits(const Simd& simd, const Head& h, int64_t active, int64_t first,
                            int64_t n, int thread);
// The softmax sums of every row of the chunk over every span, and the targets' logits. The logits
// are also stored to `chunk`, [active, columns], unless it is null.
void sum_spans(CpuDevice& cpu, const Head& h, int64_t active, float* chunk);
// Stores the logits of the chunk's rows: [active, columns].
void store_logits(CpuDevice& cpu, const Head& h, int64_t active, float* chunk);
// The results of row i of the chunk, from the sums of its spans.
RowLogProb merge_spans(const Simd& simd, const Head& h, int64_t i);

// gradients.cpp

// The gradients that dz is multiplied into.
struct Gradients {
  Out d_hidden;
  View weight, bias;                        // dweight and dbias; bias may be absent
  bool accumulate_weight, accumulate_bias;  // into what they hold already
  float* hidden = nullptr;                  // [chunk_rows, C], the chunk's hidden states
  float* products = nullptr;                // [chunk_rows, C], their gradients
  float* gemm_workspace = nullptr;          // gemm_in_task's

  template <class Args>
  explicit Gradients(const Args& a)
      : d_hidden(a.d_hidden),
        weight(a.into_weight ? View(a.into_weight) : View(a.d_weight)),
        bias(a.into_bias ? View(a.into_bias) : View(a.d_bias)),
        accumulate_weight(bool(a.into_weight)),
        accumulate_bias(bool(a.into_bias)) {}
  void take_buffers(Workspace& workspace, const Head& h, const CpuDevice& cpu);
};

// The state of a call between its chunks.
struct Progress {
  int64_t next = 0, active = 0;  // the first row after the chunk; rows of the chunk
  bool started = false,
       invalid = false;  // whether dweight was written; whether a target was invalid
};

// Writes `width` entries of a row: 0, or NaN of any float type.
void fill_row(const View& v, int64_t row, int64_t width, float x);
// Writes the gradient of a row that is not active, and records a fault if it is invalid.
RowState settle_row(const Head& h, const Gradients& g, int64_t row, RowState state, Progress& p,
                    const FaultFlag& fault);
// dz of the columns first .. first + n of row i of the chunk, whose logits are z; dz may be z.
void compute_logit_gradient(const Simd& simd, const Head& h, int64_t i,
                            const LogitGradient& gradient, const float* z, float* dz, int64_t first,
                            int64_t n);
// Converts the chunk's hidden states to f32, for dweight.
void load_hidden(CpuDevice& cpu, const Head& h, const Gradients& g, int64_t active);
// Adds the products of dz [active, n], of the columns from `first` on. `started`: whether dweight
// and dbias hold those of earlier chunks.
void multiply_gradients(CpuDevice& cpu, const Head& h, const Gradients& g, int64_t active,
                        const float* dz, int64_t pitch, int64_t first, int64_t n, bool started);
// Converts the chunk's dhidden and stores it.
void store_d_hidden(CpuDevice& cpu, const Head& h, const Gradients& g, int64_t active);
// Writes dweight and dbias where no row was active (0), or a target was invalid (NaN).
void finish_weight_gradients(CpuDevice& cpu, const Head& h, const Gradients& g, const Progress& p);

}  // namespace p2r::cpu::linear_head

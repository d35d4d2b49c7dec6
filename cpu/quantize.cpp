// Weights in 8 or 4 bits: rounding, the way back, the linear layer (cpu/simd/quantize.cpp), and the
// log-probabilities of one that is a model's head, whose logits are summed as they are made.
#include "ops/quantize.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/linear.h"
#include "cpu/log_probs.h"
#include "cpu/simd/linear.h"
#include "ops/half.h"

namespace p2r::cpu {

namespace {

constexpr int64_t kMaxGroup = 64;

// To the nearest integer, of two the even one; |x| is below 2^22.
float round_to_even(float x) {
  constexpr float kShift = 0x1.8p23f;
  return (x + kShift) - kShift;
}

// The byte of column c of a group and feature `lane` of a panel, and of 4 bits the lowest bit in
// it.
struct Place {
  int64_t byte;
  int shift;
};
Place place_of(const QuantizedLayout& layout, int64_t c, int64_t lane) {
  if (layout.bits == 8) return {c * kQuantizedPanel + lane, 0};
  const int64_t bit = c % 2 * 16 + c % 8 / 2 * 4;
  return {(c / 8 * kQuantizedPanel + lane) * 4 + bit / 8, static_cast<int>(bit % 8)};
}

// Panel by group: each is written by one thread alone, and all of its bytes are.
template <class F>
void for_each_group(CpuDevice& cpu, const QuantizedLayout& layout, const F& f) {
  const int64_t groups = layout.groups();
  cpu.launch(layout.panels() * groups, std::max<int64_t>(1, 64 * 32 / layout.group),
             [=](int64_t begin, int64_t end, int) {
               for (int64_t i = begin; i < end; ++i) f(i / groups, i % groups);
             });
}

}  // namespace

void quantize(const QuantizeArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const QuantizedLayout layout = a.layout();
  const float largest = a.bits == 8 ? 127 : 7;
  for_each_group(cpu, layout, [=, &simd = cpu.simd()](int64_t panel, int64_t g) {
    const int64_t index = panel * layout.groups() + g, first = g * layout.group;
    const int64_t columns = std::min(layout.group, layout.channels - first);
    uint8_t* values = a.values.as<uint8_t>() + index * layout.group_bytes();
    uint16_t* scales = a.scales.as<uint16_t>() + index * kQuantizedPanel;
    std::fill_n(values, layout.group_bytes(), uint8_t{0});
    std::fill_n(scales, kQuantizedPanel, uint16_t{0});
    for (int64_t lane = 0; lane < kQuantizedPanel; ++lane) {
      const int64_t row = panel * kQuantizedPanel + lane;
      if (row == layout.features) break;
      float w[kMaxGroup];
      simd.to_f32(a.weight.dtype, a.weight.element(row * layout.channels + first), w, columns);
      float magnitude = 0;
      for (int64_t c = 0; c < columns; ++c)
        if (const float x = std::fabs(w[c]); x > magnitude || x != x) magnitude = x;  // a NaN stays
      scales[lane] = f16_of_f32(magnitude / largest);
      const float scale = f32_of_f16(scales[lane]);
      if (!(scale < INFINITY)) {
        scales[lane] = 0x7e00;  // NaN
        raise(a.fault, row, bits_of_f32(magnitude));
        continue;
      }
      if (scale == 0) continue;
      for (int64_t c = 0; c < columns; ++c) {
        const float q = std::clamp(round_to_even(w[c] / scale), -largest, largest);
        const Place to = place_of(layout, c, lane);
        const int mask = a.bits == 8 ? 255 : 15;
        values[to.byte] |= static_cast<uint8_t>((static_cast<int>(q) & mask) << to.shift);
      }
    }
  });
}

void dequantize(const DequantizeArgs& a, Device& device) {
  const QuantizedLayout layout = a.layout();
  for_each_group(cpu_device(device), layout, [=](int64_t panel, int64_t g) {
    const int64_t index = panel * layout.groups() + g, first = g * layout.group;
    const int64_t columns = std::min(layout.group, layout.channels - first);
    const uint8_t* values = a.values.as<const uint8_t>() + index * layout.group_bytes();
    const uint16_t* scales = a.scales.as<const uint16_t>() + index * kQuantizedPanel;
    for (int64_t lane = 0; lane < kQuantizedPanel; ++lane) {
      const int64_t row = panel * kQuantizedPanel + lane;
      if (row == layout.features) break;
      float* to = a.out.as<float>() + row * layout.channels + first;
      for (int64_t c = 0; c < columns; ++c) {
        const Place from = place_of(layout, c, lane);
        const int up = 32 - layout.bits;
        const int q = static_cast<int>(uint32_t{values[from.byte]} >> from.shift << up) >> up;
        to[c] = static_cast<float>(q) * f32_of_f16(scales[lane]);
      }
    }
  });
}

namespace {

// A chunk of rows of x, which meets the weight a strip of features at a time.
class Product {
 public:
  template <class Args>
  Product(const Args& a, const In& x, const CpuDevice& cpu, int64_t max_rows)
      : layout_(a.layout()),
        x_(x),
        values_(a.values),
        scales_(a.scales),
        bias_(a.bias),
        pairs_(cpu.features().bf16 && x.dtype == DType::bf16),
        depth_(layout_.groups() * layout_.group / (pairs_ ? 2 : 1)),
        chunk_rows_(std::min(rows_of(x), max_rows)) {}

  void take_buffers(Workspace& workspace) {
    words_ = workspace.take<float>(chunk_rows_ * depth_);
    packed_ = workspace.take<float>(chunk_rows_ * depth_);
  }
  int64_t chunk_rows() const { return chunk_rows_; }
  int64_t panel_bytes() const { return layout_.groups() * layout_.group_bytes(); }

  // Packs row(0) .. row(rows - 1) of x.
  template <class F>
  void pack(CpuDevice& cpu, int64_t rows, const F& row) const {
    const Simd& simd = cpu.simd();
    cpu.parallel(rows, 32, [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; ++r) {
        float* to = words_ + r * depth_;
        std::fill_n(to, depth_, 0.0f);
        to_panel_words(simd, pairs_, x_.dtype, x_.element(row(r) * layout_.channels),
                       layout_.channels, 1, layout_.channels, to, depth_);
      }
    });
    simd.pack_few_rows(rows, depth_, words_, packed_);
  }
  // The features of `panels` panels from `first` on: out [rows][ld]. bias: room for them, in whole
  // panels.
  void multiply(const Simd& simd, int64_t rows, int64_t first, int64_t panels, float* bias,
                float* out, int64_t ld) const {
    const int64_t j = first * kQuantizedPanel;
    const int64_t n = std::min(panels * kQuantizedPanel, layout_.features - j);
    if (bias_) simd.to_f32(bias_.dtype, bias_.element(j), bias, n);
    simd.multiply_quantized(
        {.rows = rows,
         .panels = panels,
         .groups = layout_.groups(),
         .group = layout_.group,
         .bits = layout_.bits,
         .pairs = pairs_,
         .values = values_.as<const uint8_t>() + first * panel_bytes(),
         .scales = scales_.as<const uint16_t>() + first * layout_.groups() * kQuantizedPanel,
         .x = packed_,
         .bias = bias_ ? bias : nullptr,
         .out = out,
         .ld = ld});
  }

 private:
  QuantizedLayout layout_;
  In x_, values_, scales_, bias_;
  bool pairs_;
  int64_t depth_, chunk_rows_;
  float *words_ = nullptr, *packed_ = nullptr;
};

}  // namespace

void quantized_linear(const QuantizedLinearArgs& a, Device& device) {
  constexpr int64_t kMaxChunkRows = 1024;
  constexpr int64_t kStripFloats = 64 * 1024;  // of sums, before they are rounded
  constexpr int64_t kLeastChunkBytes = 128 * 1024;
  CpuDevice& cpu = cpu_device(device);
  const QuantizedLayout layout = a.layout();
  const int64_t total = rows_of(a.x);
  if (total == 0 || layout.features == 0) return;
  Product product(a, a.x, cpu, kMaxChunkRows);
  const int64_t chunk_rows = product.chunk_rows();
  const std::vector<int64_t> chunks = cut_features(
      layout.panels(), ceil_div(kLeastChunkBytes, std::max<int64_t>(product.panel_bytes(), 1)),
      cpu.threads());
  const int64_t strip_panels =
      std::clamp<int64_t>(kStripFloats / kQuantizedPanel / chunk_rows, 1, 64);
  const int64_t ld = strip_panels * kQuantizedPanel;
  const int64_t strip = (chunk_rows + 1) * ld;  // and the bias
  float* strips = nullptr;
  const auto take_buffers = [&](Workspace& workspace) {
    product.take_buffers(workspace);
    strips = workspace.take<float>(cpu.threads() * strip);
  };
  Workspace size(nullptr);
  take_buffers(size);
  const Scratch scratch(device, size.bytes());
  Workspace workspace(scratch.as<char>());
  take_buffers(workspace);
  cpu.submit([=, &cpu] {
    const Simd& simd = cpu.simd();
    for (int64_t first = 0; first < total; first += chunk_rows) {
      const int64_t rows = std::min(chunk_rows, total - first);
      product.pack(cpu, rows, [=](int64_t r) { return first + r; });
      cpu.parallel(static_cast<int64_t>(chunks.size()) - 1, 1,
                   [&](int64_t begin, int64_t end, int thread) {
                     float* sums = strips + thread * strip;
                     for (int64_t p = chunks[begin]; p < chunks[end]; p += strip_panels) {
                       const int64_t panels = std::min(strip_panels, chunks[end] - p);
                       const int64_t j = p * kQuantizedPanel;
                       const int64_t n = std::min(panels * kQuantizedPanel, layout.features - j);
                       product.multiply(simd, rows, p, panels, sums + chunk_rows * ld, sums, ld);
                       for (int64_t r = 0; r < rows; ++r)
                         simd.from_f32(a.out.dtype, sums + r * ld,
                                       a.out.element((first + r) * layout.features + j), n);
                     }
                   });
    }
  });
}

void quantized_linear_log_probs(const QuantizedLinearLogProbsArgs& a, Device& device) {
  constexpr int64_t kMaxChunkRows = 256;
  CpuDevice& cpu = cpu_device(device);
  const int64_t total = a.hidden.shape[0], columns = a.vocabulary;
  const int64_t span = sum_span(columns), spans = ceil_div(columns, span);
  const int64_t runs = cpu.simd().vector_width();
  Product product(a, a.hidden, cpu, kMaxChunkRows);
  const int64_t chunk_rows = product.chunk_rows();
  // A thread's step of logits, its bias, and the rows' running sums.
  const int64_t own_floats = (chunk_rows + 1) * kSoftmaxColumns + chunk_rows * 4 * runs;
  int64_t* chunk = nullptr;
  float *own = nullptr, *partials = nullptr, *target_logits = nullptr;
  const auto take_buffers = [&](Workspace& workspace) {
    product.take_buffers(workspace);
    chunk = workspace.take<int64_t>(chunk_rows);
    own = workspace.take<float>(cpu.threads() * own_floats);
    partials = workspace.take<float>(chunk_rows * spans * 3);
    target_logits = workspace.take<float>(chunk_rows);
  };
  Workspace size(nullptr);
  take_buffers(size);
  const Scratch scratch(device, size.bytes());
  Workspace workspace(scratch.as<char>());
  take_buffers(workspace);
  cpu.submit([=, &cpu] {
    const Simd& simd = cpu.simd();
    const double inverse = 1 / a.temperature;
    const SoftmaxExtra extra = extra_of(a);
    const auto target_of = [&](int64_t row) { return a.targets.as<int32_t>()[row]; };
    for (int64_t next = 0; next < total;) {
      int64_t rows = 0;
      for (; next < total && rows < chunk_rows; ++next) {
        const int32_t target = target_of(next);
        const bool invalid = target != kSkippedTarget && (target < 0 || target >= columns);
        if (invalid) raise(a.fault, next, static_cast<uint32_t>(target));
        if (invalid || target == kSkippedTarget)
          write_row(a, next, invalid ? kNoLogProb : RowLogProb{});
        else
          chunk[rows++] = next;
      }
      if (!rows) continue;
      product.pack(cpu, rows, [=](int64_t r) { return chunk[r]; });
      cpu.parallel(spans, 1, [&](int64_t begin, int64_t end, int thread) {
        float* logits = own + thread * own_floats;
        float* bias = logits + chunk_rows * kSoftmaxColumns;
        float* running = bias + kSoftmaxColumns;
        for (int64_t s = begin; s < end; ++s) {
          for (int64_t r = 0; r < rows; ++r) {
            std::fill_n(running + r * 4 * runs, 2 * runs, -INFINITY);
            std::fill_n(running + (4 * r + 2) * runs, 2 * runs, 0.0f);
          }
          const int64_t stop = std::min(columns, (s + 1) * span);
          for (int64_t first = s * span; first < stop; first += kSoftmaxColumns) {
            const int64_t n = std::min(kSoftmaxColumns, stop - first);
            product.multiply(simd, rows, first / kQuantizedPanel, ceil_div(n, kQuantizedPanel),
                             bias, logits, kSoftmaxColumns);
            for (int64_t r = 0; r < rows; ++r) {
              const float* row = logits + r * kSoftmaxColumns;
              simd.softmax_row(n, static_cast<float>(inverse), extra, row, running + r * 4 * runs);
              const int64_t label = target_of(chunk[r]) - first;
              if (label >= 0 && label < n) target_logits[r] = row[label];
            }
          }
          for (int64_t r = 0; r < rows; ++r)
            simd.softmax_runs(1, static_cast<float>(inverse), extra, running + r * 4 * runs,
                              partials + (r * spans + s) * 3);
        }
      });
      for (int64_t r = 0; r < rows; ++r)
        write_row(a, chunk[r],
                  row_log_prob(merge_spans(simd, partials + r * spans * 3, spans, inverse, extra),
                               target_logits[r], inverse, extra));
    }
  });
}

}  // namespace p2r::cpu

// Gradients of a linear head: dz, the gradient of the logits, row by row, and its products
// dhidden = dz weight, dweight = dz^T hidden, dbias = column sums of dz.
#include "cpu/linear_log_probs/linear_log_probs.h"

namespace p2r::cpu::linear_head {

namespace {

constexpr int64_t kBiasColumns = 512;  // of the bias's gradient at once

}  // namespace

void Gradients::take_buffers(Workspace& workspace, const Head& h, const CpuDevice& cpu) {
  hidden = workspace.take<float>(h.chunk_rows * h.channels);
  products = workspace.take<float>(h.chunk_rows * h.channels);
  gemm_workspace = workspace.take<float>(gemm_workspace_floats(cpu, h.channels));
}

void fill_row(const View& v, int64_t row, int64_t width, float x) {
  char* to = v.element(row * width);
  if (v.dtype == DType::f32)
    std::fill_n(reinterpret_cast<float*>(to), width, x);
  else  // 0, or a NaN of both 16-bit types
    std::fill_n(reinterpret_cast<uint16_t*>(to), width, uint16_t(x == 0 ? 0 : 0x7fff));
}

RowState settle_row(const Head& h, const Gradients& g, int64_t row, RowState state, Progress& p,
                    const FaultFlag& fault) {
  if (state == RowState::active) return state;
  if (state == RowState::invalid) {
    raise(fault, row, static_cast<uint32_t>(h.targets.as<int32_t>()[row]));
    p.invalid = true;
  }
  fill_row(g.d_hidden, row, h.channels, state == RowState::invalid ? kNan : 0);
  return state;
}

void compute_logit_gradient(const Simd& simd, const Head& h, int64_t i,
                            const LogitGradient& gradient, const float* z, float* dz, int64_t first,
                            int64_t n) {
  const int64_t label = h.target(i) - first;
  const bool has_target = label >= 0 && label < n;
  const double x = has_target ? z[label] : 0;
  simd.logit_gradient(DType::f32, z, dz, n, &gradient.row);
  if (has_target) dz[label] = gradient.at_target(x);
}

void load_hidden(CpuDevice& cpu, const Head& h, const Gradients& g, int64_t active) {
  cpu.parallel(active, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i)
      cpu.simd().to_f32(h.hidden.dtype, h.hidden.element(h.active_rows[i] * h.channels),
                        g.hidden + i * h.channels, h.channels);
  });
}

void multiply_gradients(CpuDevice& cpu, const Head& h, const Gradients& g, int64_t active,
                        const float* dz, int64_t pitch, int64_t first, int64_t n, bool started) {
  const Matrix d_logits = {dz, DType::f32, pitch, 1};
  gemm_in_task(cpu,
               {.m = active,
                .n = h.channels,
                .k = n,
                .a = d_logits,
                .b = matrix_of(h.weight).from(first, 0),
                .c = g.products,
                .c_row_stride = h.channels,
                .accumulate = first > 0},
               g.gemm_workspace);
  gemm_in_task(cpu,
               {.m = n,
                .n = h.channels,
                .k = active,
                .a = d_logits.transposed(),
                .b = {g.hidden, DType::f32, h.channels, 1},
                .c = g.weight.as<float>() + first * h.channels,
                .c_row_stride = h.channels,
                .accumulate = g.accumulate_weight || started},
               g.gemm_workspace);
  if (!g.bias) return;
  const bool add = g.accumulate_bias || started;
  cpu.parallel(ceil_div(n, kBiasColumns), 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t offset = c * kBiasColumns, width = std::min(kBiasColumns, n - offset);
      float sums[kBiasColumns] = {};
      for (int64_t i = 0; i < active; ++i)
        for (int64_t j = 0; j < width; ++j) sums[j] += dz[i * pitch + offset + j];
      float* to = g.bias.as<float>() + first + offset;
      for (int64_t j = 0; j < width; ++j) to[j] = add ? to[j] + sums[j] : sums[j];
    }
  });
}

void store_d_hidden(CpuDevice& cpu, const Head& h, const Gradients& g, int64_t active) {
  cpu.parallel(active, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i)
      cpu.simd().from_f32(g.d_hidden.dtype, g.products + i * h.channels,
                          g.d_hidden.element(h.active_rows[i] * h.channels), h.channels);
  });
}

void finish_weight_gradients(CpuDevice& cpu, const Head& h, const Gradients& g, const Progress& p) {
  const float x = p.invalid ? kNan : 0;
  const bool weight = p.invalid || !(p.started || g.accumulate_weight);
  const bool bias = g.bias && (p.invalid || !(p.started || g.accumulate_bias));
  cpu.parallel(h.columns, 64, [&](int64_t begin, int64_t end, int) {
    for (int64_t j = begin; j < end && (weight || bias); ++j) {
      if (weight) fill_row(g.weight, j, h.channels, x);
      if (bias) g.bias.as<float>()[j] = x;
    }
  });
}

}  // namespace p2r::cpu::linear_head

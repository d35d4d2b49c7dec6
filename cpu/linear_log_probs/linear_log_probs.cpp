// The operations linear_log_probs, linear_log_probs_backward and linear_policy_loss on the CPU: for
// each chunk of active rows, the kernels of this folder; see linear_log_probs.h.
#include "cpu/linear_log_probs/linear_log_probs.h"

namespace p2r::cpu {

using namespace linear_head;

void policy_loss(const PolicyLossArgs& a, Device& device);

namespace {

constexpr int64_t kMaxGradientFloats = 8 * 1024 * 1024;  // of dz in the backward pass
constexpr int64_t kMaxLogitFloats = 32 * 1024 * 1024;    // of the policy loss
constexpr int64_t kTaskColumns = 4096;  // columns of a task that computes dz of the policy loss

}  // namespace

void linear_log_probs(const LinearLogProbsArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  Head h(a, cpu, kMaxChunkRows);
  h.extra = extra_of(a);
  Workspace size(nullptr);
  h.take_buffers(size, cpu, true);
  const Scratch scratch(device, size.bytes());
  Workspace workspace(scratch.as<char>());
  h.take_buffers(workspace, cpu, true);
  cpu.submit([=, &cpu] {
    for (int64_t next = 0; next < h.rows;) {
      const int64_t active = gather_rows(h, next, [&](int64_t row) {
        const RowState state = h.state_of(row);
        if (state == RowState::invalid)
          raise(a.fault, row, static_cast<uint32_t>(a.targets.as<int32_t>()[row]));
        if (state != RowState::active)
          write_row(a, row, state == RowState::invalid ? kNoLogProb : RowLogProb{});
        return state;
      });
      if (!active) continue;
      pack_hidden(cpu, h, active);
      sum_spans(cpu, h, active, nullptr);
      for (int64_t i = 0; i < active; ++i)
        write_row(a, h.active_rows[i], merge_spans(cpu.simd(), h, i));
    }
  });
}

void linear_log_probs_backward(const LinearLogProbsBackwardArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  Head h(a, cpu, kMaxChunkRows);
  Gradients g(a);
  // Columns of dz at once.
  const int64_t part =
      std::min(round_up(std::max<int64_t>(h.columns, 1), h.block),
               std::max<int64_t>(kMaxGradientFloats / h.chunk_rows / h.block, 1) * h.block);
  float* dz = nullptr;
  const auto take_buffers = [&](Workspace& w) {
    h.take_buffers(w, cpu, false);
    g.take_buffers(w, h, cpu);
    dz = w.take<float>(h.chunk_rows * part);
  };
  Workspace size(nullptr);
  take_buffers(size);
  const Scratch scratch(device, size.bytes());
  Workspace workspace(scratch.as<char>());
  take_buffers(workspace);
  cpu.submit([=, &cpu] {
    const Simd& simd = cpu.simd();
    // The gradients of a row's log-probability and entropy, divided by the temperature.
    const auto load_gradients = [&](int64_t row, double& dg, double& dh) {
      dg = a.d_log_probs.as<float>()[row] * h.inverse;
      dh = a.d_entropy ? a.d_entropy.as<float>()[row] * h.inverse : 0;
    };
    Progress p;
    while (p.next < h.rows) {
      const int64_t active = gather_rows(h, p.next, [&](int64_t row) {
        double dg, dh;
        load_gradients(row, dg, dh);
        const RowState state = h.state_of(row);
        const bool has_gradient = state == RowState::invalid || dg != 0 || dh != 0;
        return settle_row(h, g, row, has_gradient ? state : RowState::skipped, p, a.fault);
      });
      if (!active) continue;
      pack_hidden(cpu, h, active);
      load_hidden(cpu, h, g, active);
      for (int64_t first = 0; first < h.columns; first += part) {
        const int64_t n = std::min(part, h.columns - first);
        cpu.parallel(ceil_div(n, h.block), 1, [&](int64_t begin, int64_t end, int thread) {
          for (int64_t b = begin; b < end; ++b) {
            const int64_t offset = b * h.block, width = std::min(h.block, n - offset);
            float* to = dz + offset;
            simd.transpose(width, active,
                           compute_logits(simd, h, active, first + offset, width, thread), h.pitch,
                           to, part);
            for (int64_t i = 0; i < active; ++i) {
              const int64_t row = h.active_rows[i];
              double dg, dh;
              load_gradients(row, dg, dh);
              const LogitGradient gradient(h.inverse, a.stats.as<float>() + 2 * row, dg, dh,
                                           dh != 0 ? a.entropy.as<float>()[row] : 0);
              compute_logit_gradient(simd, h, i, gradient, to + i * part, to + i * part,
                                     first + offset, width);
            }
          }
        });
        multiply_gradients(cpu, h, g, active, dz, part, first, n, p.started);
      }
      store_d_hidden(cpu, h, g, active);
      p.started = true;
    }
    finish_weight_gradients(cpu, h, g, p);
  });
}

void linear_policy_loss(const LinearPolicyLossArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t columns = a.weight.shape[0];
  const int64_t max_rows =
      std::max(kMaxLogitFloats / std::max<int64_t>(columns, 1) / kMaxPanelRows, int64_t{1}) *
      kMaxPanelRows;
  Head h(a, cpu, max_rows);
  Gradients g(a);
  const bool with_entropy = a.loss.entropy_coef != 0;
  if (with_entropy) h.extra = SoftmaxExtra::moment;
  float *logits = nullptr, *stats = nullptr, *entropy = nullptr, *d_log_probs = nullptr,
        *d_entropy = nullptr;
  Progress* progress = nullptr;
  const auto take_buffers = [&](Workspace& w) {
    h.take_buffers(w, cpu, true);
    g.take_buffers(w, h, cpu);
    logits = w.take<float>(h.chunk_rows * h.columns);
    stats = w.take<float>(h.chunk_rows * 2);
    d_log_probs = w.take<float>(std::max<int64_t>(h.rows, 1));
    progress = w.take<Progress>(1);
    if (!with_entropy) return;
    entropy = w.take<float>(std::max<int64_t>(h.rows, 1));
    d_entropy = w.take<float>(std::max<int64_t>(h.rows, 1));
  };
  Workspace size(nullptr);
  take_buffers(size);
  const Scratch scratch(device, size.bytes());
  Workspace workspace(scratch.as<char>());
  take_buffers(workspace);

  const auto tokens = [&](float* data) {
    View v;
    v.data = data;
    v.shape = {h.rows};
    return v;
  };
  PolicyLossArgs loss = a.loss;
  loss.fault = a.fault;
  static_cast<View&>(loss.log_probs) = a.log_probs;
  static_cast<View&>(loss.d_log_probs) = tokens(d_log_probs);
  if (with_entropy) {
    static_cast<View&>(loss.entropy) = tokens(entropy);
    static_cast<View&>(loss.d_entropy) = tokens(d_entropy);
  }

  float* log_probs = a.log_probs.as<float>();
  cpu.submit([=] {
    *progress = {};
    std::fill_n(log_probs, h.rows, 0.0f);
    if (entropy) std::fill_n(entropy, h.rows, 0.0f);
  });
  for (int64_t first = 0; first == 0 || first < h.rows; first += h.chunk_rows) {
    cpu.submit([=, &cpu] {
      Progress& p = *progress;
      p.active = gather_rows(h, p.next, [&](int64_t row) {
        const RowState state = h.state_of(row);
        if (state == RowState::invalid) {
          log_probs[row] = kNan;
          if (entropy) entropy[row] = kNan;
        }
        return settle_row(h, g, row, state, p, a.fault);
      });
      if (!p.active) return;
      pack_hidden(cpu, h, p.active);
      sum_spans(cpu, h, p.active, logits);
      for (int64_t i = 0; i < p.active; ++i) {
        const RowLogProb r = merge_spans(cpu.simd(), h, i);
        log_probs[h.active_rows[i]] = r.log_prob;
        if (entropy) entropy[h.active_rows[i]] = r.extra;
        stats[2 * i] = r.stats[0];
        stats[2 * i + 1] = r.stats[1];
      }
    });
    // A token's gradient depends on its own log-probability alone, so it is final as soon as that
    // is known; the loss is final after the last chunk. This costs next to nothing beside the
    // products.
    policy_loss(loss, device);
    cpu.submit([=, &cpu] {
      const Simd& simd = cpu.simd();
      Progress& p = *progress;
      if (!p.active) return;
      const auto gradient_of = [&](int64_t i) {
        const int64_t row = h.active_rows[i];
        const double dh = d_entropy ? d_entropy[row] * h.inverse : 0;
        return LogitGradient(h.inverse, stats + 2 * i, d_log_probs[row] * h.inverse, dh,
                             dh != 0 ? entropy[row] : 0);
      };
      const auto has_gradient = [&](const LogitGradient& x) { return x.g != 0 || x.h != 0; };
      // dz overwrites the logits, compacted: rows without a gradient are left out.
      cpu.parallel(ceil_div(h.columns, kTaskColumns), 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t t = begin; t < end; ++t) {
          const int64_t offset = t * kTaskColumns;
          const int64_t width = std::min(kTaskColumns, h.columns - offset);
          int64_t to = 0;
          for (int64_t i = 0; i < p.active; ++i) {
            const LogitGradient gradient = gradient_of(i);
            if (!has_gradient(gradient)) continue;
            compute_logit_gradient(simd, h, i, gradient, logits + i * h.columns + offset,
                                   logits + to++ * h.columns + offset, offset, width);
          }
        }
      });
      int64_t remaining = 0;
      for (int64_t i = 0; i < p.active; ++i) {
        if (has_gradient(gradient_of(i)))
          h.active_rows[remaining++] = h.active_rows[i];
        else
          fill_row(g.d_hidden, h.active_rows[i], h.channels, 0);
      }
      if (!remaining) return;
      load_hidden(cpu, h, g, remaining);
      multiply_gradients(cpu, h, g, remaining, logits, h.columns, 0, h.columns, p.started);
      store_d_hidden(cpu, h, g, remaining);
      p.started = true;
    });
  }
  cpu.submit([=, &cpu] { finish_weight_gradients(cpu, h, g, *progress); });
}

}  // namespace p2r::cpu

// Divergences of two distributions over the vocabulary. A thread takes a whole row: a pass over
// both heads' logits for their softmax sums, which are all that a KL divergence needs; one more for
// the mixture of jsd; and one for the gradient. A row of 151 936 f32 logits is 0.6 MB a head, so
// that the later passes read the second- or third-level cache.
//
// Of linear heads, a chunk of rows' logits is computed by the kernels of cpu/linear_log_probs/ and
// stored. [256, 1024] and [256, 2048] x [32 000, .] of f32 are 50 GFLOP for the logits, 0.17 s at
// 300 GFLOP/s on two cores; storing and reading both logits moves 131 MB, 10 ms. The gradient's
// two products are another 34 GFLOP.
#include "ops/distillation.h"

#include <algorithm>
#include <cmath>

#include "cpu/linear_log_probs/linear_log_probs.h"

namespace p2r::cpu {

using namespace linear_head;

namespace {

constexpr int64_t kMaxLogitFloats = 16 * 1024 * 1024;  // of a head's chunk
constexpr int64_t kTokenGrain = 4096;

// Of some columns of a row: the maximum of z, Σ e^d, Σ e^d (d - e), the maximum of y and Σ e^e, as
// divergence_sums defines them.
struct PairSums {
  double maximum_z = -kInfinity, sum_z = 0, cross = 0, maximum_y = -kInfinity, sum_y = 0;
};

PairSums merged(const PairSums& a, const PairSums& b, double inverse) {
  const double z = std::max(a.maximum_z, b.maximum_z), y = std::max(a.maximum_y, b.maximum_y);
  const auto rescaled = [&](const PairSums& s) {
    // Without a column above -inf there is nothing to rescale, and the shift would be NaN.
    const double shift_z = s.sum_z == 0 ? 0 : (s.maximum_z - z) * inverse;
    const double shift_y = s.sum_y == 0 ? 0 : (s.maximum_y - y) * inverse;
    const double scale = std::exp(shift_z);
    const double cross = s.cross + (shift_z - shift_y) * s.sum_z;
    return PairSums{z, scale * s.sum_z, scale == 0 ? 0 * s.sum_z : scale * cross, y,
                    std::exp(shift_y) * s.sum_y};
  };
  const PairSums p = rescaled(a), q = rescaled(b);
  return {z, p.sum_z + q.sum_z, p.cross + q.cross, y, p.sum_y + q.sum_y};
}

struct Formula {
  Divergence objective;
  double beta, inverse;  // 1 / temperature

  template <class Args>
  explicit Formula(const Args& a)
      : objective(a.objective), beta(a.beta), inverse(1 / a.temperature) {}
};

// The divergence of a row, and what its gradient needs, times d_divergence.
DivergenceRow row_divergence(const Simd& simd, const Formula& f, DType type, const char* student,
                             const char* teacher, int64_t columns, double d_divergence,
                             float* divergence) {
  // KL(q||p) is KL(p||q) of the other.
  const bool forward = f.objective == Divergence::forward_kl;
  const char *z = forward ? teacher : student, *y = forward ? student : teacher;
  const int64_t run_bytes = kDivergenceRun * static_cast<int64_t>(size_of(type));
  const auto each_run = [&](const auto& use) {
    for (int64_t first = 0, offset = 0; first < columns;
         first += kDivergenceRun, offset += run_bytes)
      use(offset, std::min(kDivergenceRun, columns - first));
  };
  PairSums s;
  each_run([&](int64_t offset, int64_t n) {
    float part[5];
    simd.divergence_sums(type, z + offset, y + offset, n, static_cast<float>(f.inverse), part);
    s = merged(s, {part[0], part[1], part[2], part[3], part[4]}, f.inverse);
  });

  DivergenceRow row = {};
  row.objective = f.objective;
  row.beta = static_cast<float>(f.beta);
  row.inverse = static_cast<float>(f.inverse);
  row.inverse_low = static_cast<float>(f.inverse - row.inverse);
  for (int head = 0; head < 2; ++head) {
    float stats[2];
    write_stats(head == forward ? Sums{s.maximum_z, s.sum_z} : Sums{s.maximum_y, s.sum_y},
                f.inverse, stats);
    row.maximum[head] = stats[0];
    row.log_sum[head] = stats[1];
  }
  double d = s.cross / s.sum_z - std::log(s.sum_z) + std::log(s.sum_y), subtract = d;
  double scale = d_divergence * f.inverse;
  if (s.sum_z == 0 || s.sum_y == 0) d = kNan;
  if (f.objective == Divergence::jsd && d == d) {
    double of_teacher = 0, of_student = 0;
    each_run([&](int64_t offset, int64_t n) {
      float part[2];
      simd.mixture_sums(type, z + offset, y + offset, n, &row, part);
      of_teacher += part[0];
      of_student += part[1];
    });
    d = f.beta * of_teacher + (1 - f.beta) * of_student;
    subtract = of_student;
    scale *= 1 - f.beta;
  }
  *divergence = static_cast<float>(d < 0 ? 0 : d);  // below 0 by rounding alone
  row.subtract = static_cast<float>(subtract);
  row.scale = d == d && (std::isfinite(d) || forward) ? static_cast<float>(scale) : kNan;
  return row;
}

// Whether a row takes part, by the mask; raises the fault of one that is neither 0 nor 1.
RowState state_by_mask(const In& mask, int64_t row, const FaultFlag& fault) {
  const uint8_t value = mask ? mask.as<uint8_t>()[row] : 1;
  if (value <= 1) return value ? RowState::active : RowState::skipped;
  raise(fault, row, value, true);
  return RowState::invalid;
}

constexpr float without_logits(RowState state) { return state == RowState::invalid ? kNan : 0; }

// Both heads, cut alike into chunks of rows, and a chunk of the logits of each.
struct HeadPair {
  Head student, teacher;
  float *z = nullptr, *y = nullptr;  // [chunk_rows, columns]

  template <class Args>
  HeadPair(const Args& a, const CpuDevice& cpu)
      : student(of_student(a), cpu, max_rows(a)), teacher(of_teacher(a), cpu, student.chunk_rows) {
    if (teacher.chunk_rows < student.chunk_rows)
      student = Head(of_student(a), cpu, teacher.chunk_rows);
  }

  void take_buffers(Workspace& w, const CpuDevice& cpu) {
    student.take_buffers(w, cpu, false);
    teacher.take_buffers(w, cpu, false);
    teacher.active_rows = student.active_rows;
    z = w.take<float>(student.chunk_rows * student.columns);
    y = w.take<float>(student.chunk_rows * student.columns);
  }

  // Fills the chunk as gather_rows does, and computes its logits; returns the number of its rows.
  template <class F>
  int64_t next_chunk(CpuDevice& cpu, int64_t& next, const F& state) const {
    const int64_t active = gather_rows(student, next, state);
    if (!active) return 0;
    for (const auto& [head, logits] : {std::pair{&student, z}, std::pair{&teacher, y}}) {
      pack_hidden(cpu, *head, active);
      store_logits(cpu, *head, active, logits);
    }
    return active;
  }

  // The divergence of row i of the chunk.
  DivergenceRow row(const Simd& simd, const Formula& f, int64_t i, double d_divergence,
                    float* divergence) const {
    const int64_t offset = i * student.columns;
    return row_divergence(simd, f, DType::f32, reinterpret_cast<const char*>(z + offset),
                          reinterpret_cast<const char*>(y + offset), student.columns, d_divergence,
                          divergence);
  }

 private:
  struct HeadArgs {
    In hidden, weight, bias, targets;
    double temperature;
  };
  template <class Args>
  static HeadArgs of_student(const Args& a) {
    return {a.hidden, a.weight, a.bias, {}, a.temperature};
  }
  template <class Args>
  static HeadArgs of_teacher(const Args& a) {
    return {a.teacher_hidden, a.teacher_weight, a.teacher_bias, {}, a.temperature};
  }
  template <class Args>
  static int64_t max_rows(const Args& a) {
    const int64_t columns = std::max<int64_t>(a.weight.shape[0], 1);
    return std::max(kMaxLogitFloats / columns / kMaxPanelRows, int64_t{1}) * kMaxPanelRows;
  }
};

}  // namespace

void distillation(const DistillationArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t columns = a.logits.shape[1];
  cpu.launch(a.logits.shape[0], 1, [=, &simd = cpu.simd()](int64_t begin, int64_t end, int) {
    const Formula f(a);
    float* divergence = a.divergence.as<float>();
    for (int64_t i = begin; i < end; ++i) {
      const RowState state = state_by_mask(a.mask, i, a.fault);
      divergence[i] = without_logits(state);
      if (state == RowState::active)
        row_divergence(simd, f, a.logits.dtype, a.logits.element(i * columns),
                       a.teacher_logits.element(i * columns), columns, 0, divergence + i);
    }
  });
}

void distillation_backward(const DistillationBackwardArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t columns = a.logits.shape[1];
  cpu.launch(a.logits.shape[0], 1, [=, &simd = cpu.simd()](int64_t begin, int64_t end, int) {
    const Formula f(a);
    float* divergence = a.divergence.as<float>();
    for (int64_t i = begin; i < end; ++i) {
      const RowState state = state_by_mask(a.mask, i, a.fault);
      divergence[i] = without_logits(state);
      const double d_divergence = a.d_divergence.as<float>()[i];
      const char *z = a.logits.element(i * columns), *y = a.teacher_logits.element(i * columns);
      DivergenceRow row;
      if (state == RowState::active)
        row = row_divergence(simd, f, a.logits.dtype, z, y, columns, d_divergence, divergence + i);
      if (state == RowState::active && d_divergence != 0)
        simd.divergence_gradient(a.logits.dtype, z, y, a.d_logits.element(i * columns), columns,
                                 &row);
      else
        fill_row(a.d_logits, i, columns, without_logits(state));
    }
  });
}

void linear_distillation(const LinearDistillationArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  HeadPair heads(a, cpu);
  Workspace size(nullptr);
  heads.take_buffers(size, cpu);
  const Scratch scratch(device, size.bytes());
  Workspace workspace(scratch.as<char>());
  heads.take_buffers(workspace, cpu);
  cpu.submit([=, &cpu] {
    const Formula f(a);
    float* divergence = a.divergence.as<float>();
    for (int64_t next = 0; next < heads.student.rows;) {
      const int64_t active = heads.next_chunk(cpu, next, [&](int64_t row) {
        const RowState state = state_by_mask(a.mask, row, a.fault);
        divergence[row] = without_logits(state);
        return state;
      });
      cpu.parallel(active, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i)
          heads.row(cpu.simd(), f, i, 0, divergence + heads.student.active_rows[i]);
      });
    }
  });
}

void linear_distillation_backward(const LinearDistillationBackwardArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  HeadPair heads(a, cpu);
  Gradients g(a);
  const auto take_buffers = [&](Workspace& w) {
    heads.take_buffers(w, cpu);
    g.take_buffers(w, heads.student, cpu);
  };
  Workspace size(nullptr);
  take_buffers(size);
  const Scratch scratch(device, size.bytes());
  Workspace workspace(scratch.as<char>());
  take_buffers(workspace);
  cpu.submit([=, &cpu] {
    const Formula f(a);
    const Head& h = heads.student;
    float* divergence = a.divergence.as<float>();
    const float* d_divergence = a.d_divergence.as<float>();
    Progress p;
    while (p.next < h.rows) {
      const int64_t active = heads.next_chunk(cpu, p.next, [&](int64_t row) {
        const RowState state = state_by_mask(a.mask, row, a.fault);
        p.invalid |= state == RowState::invalid;
        divergence[row] = without_logits(state);
        // Rows without a gradient keep it; the others' is stored below.
        fill_row(g.d_hidden, row, h.channels, divergence[row]);
        return state;
      });
      if (!active) continue;
      // dz overwrites the student's logits.
      cpu.parallel(active, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t row = h.active_rows[i];
          const DivergenceRow formula =
              heads.row(cpu.simd(), f, i, d_divergence[row], divergence + row);
          float* z = heads.z + i * h.columns;
          if (d_divergence[row] != 0)
            cpu.simd().divergence_gradient(DType::f32, z, heads.y + i * h.columns, z, h.columns,
                                           &formula);
        }
      });
      // Rows without a gradient are left out, so that a NaN of theirs does not reach dweight.
      int64_t remaining = 0;
      for (int64_t i = 0; i < active; ++i) {
        if (d_divergence[h.active_rows[i]] == 0) continue;
        if (i != remaining)
          std::copy_n(heads.z + i * h.columns, h.columns, heads.z + remaining * h.columns);
        h.active_rows[remaining++] = h.active_rows[i];
      }
      if (!remaining) continue;
      load_hidden(cpu, h, g, remaining);
      multiply_gradients(cpu, h, g, remaining, heads.z, h.columns, 0, h.columns, p.started);
      store_d_hidden(cpu, h, g, remaining);
      p.started = true;
    }
    finish_weight_gradients(cpu, h, g, p);
  });
}

void distillation_advantages(const DistillationAdvantagesArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t sequences = static_cast<int64_t>(a.cu_seqlens.size()) - 1;
  const int64_t tokens = a.log_probs.size();
  const int64_t grain =
      std::max<int64_t>(kTokenGrain * sequences / std::max<int64_t>(tokens, 1), 1);
  cpu.launch(sequences, grain, [a](int64_t begin, int64_t end, int) {
    const float *log_p = a.log_probs.as<float>(), *log_q = a.teacher_log_probs.as<float>();
    const float* base = a.base.as<float>();
    float* out = a.advantages.as<float>();
    for (int64_t i = begin; i < end; ++i) {
      double later = 0;  // the discounted sum of the tokens after t
      for (int64_t t = a.cu_seqlens[i + 1]; t-- > a.cu_seqlens[i];) {
        const RowState state = state_by_mask(a.mask, t, a.fault);
        double x = 0;
        if (state == RowState::active) {
          x = double(log_p[t]) - log_q[t];
          if (a.clamp > 0) x = x < -a.clamp ? -a.clamp : x > a.clamp ? a.clamp : x;
        }
        later = a.discount == 0 ? x : x + a.discount * later;
        const double own = base ? base[a.per_token ? t : i] : 0;
        out[t] = state == RowState::active ? static_cast<float>(own - a.coef * later)
                                           : without_logits(state);
      }
    }
  });
}

}  // namespace p2r::cpu

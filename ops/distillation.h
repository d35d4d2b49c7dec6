// Distillation of a teacher into a student over one vocabulary: divergences of their distributions,
// from logits or from the hidden states of two linear heads, and advantages from log-probabilities.
//
// p = softmax(z / temperature) of the student's logits z, q = softmax(y / temperature) of the
// teacher's y, and for each row a divergence D with its gradient, which reaches the student alone:
//
//   reverse_kl  D = KL(p||q) = Σ p (log p - log q)
//               dz = p (log p - log q - D) / temperature
//
//   forward_kl  D = KL(q||p) = Σ q (log q - log p)
//               dz = (p - q) / temperature
//
//   jsd         D = beta KL(q||m) + (1 - beta) KL(p||m), m = beta q + (1 - beta) p, 0 < beta < 1
//               dz = (1 - beta) p (log p - log m - KL(p||m)) / temperature
//
// Forward KL is Hinton et al. 2015 (without its factor temperature²), reverse KL MiniLLM (Gu et al.
// 2024), jsd the generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2024), whose beta 0
// is forward_kl and beta 1 reverse_kl. Read: trl/experimental/gkd/gkd_trainer.py of huggingface/trl
// f2cd5771 (generalized_jsd_loss). A backward pass computes the gradient of Σ d_divergence D, and
// D too, so that a training step needs no other call.
//
// Rows: where the mask is 0 a row is not read, D and its gradients are 0; a value other than 0 and
// 1 faults, and gives NaN for the row, and for all of dweight and dbias. Backward, a row whose
// d_divergence is 0 has gradients of 0. 0 log 0 = 0: a column with p = 0, where the divergence
// weights by p, adds nothing, whatever the other head has; one with p > 0 and q = 0 makes
// reverse_kl inf, and its gradient NaN; one with q > 0 and p = 0 makes forward_kl inf, with a
// finite gradient. Probabilities below 2^-126 are 0. A row with NaN or +inf, or of -inf alone, or
// of no columns, in either head is NaN. Equal logits give 0 and a gradient of 0, exactly.
//
// Precision: D is off by some 1e-6 times the largest |z - y| / temperature of columns that count.
// Sums run in an order that depends on the column alone, in f32 in short runs; runs are added in
// f64.
//
// Of logits: logits, teacher_logits [N, V] f32 | f16 | bf16 of one type; mask u8 [N]; divergence,
// d_divergence f32 [N]; d_logits as logits, and may be logits.
//
// Of linear heads: z = hidden [N, C] . weight [V, C]^T + bias [V], and y likewise of teacher_hidden
// [N, C'], teacher_weight [V, C'] and teacher_bias [V]: the hidden sizes and the types of the two
// may differ. Types, gradients, their rounding and accumulation as in ops/linear_log_probs.h. Each
// logit is computed once, in chunks of rows: beside what the gradients need, chunks of logits of
// both heads take 128 MB (of at least 32 rows on the CPU, 12 on CUDA), or 640 MB on tensor cores.
//
// Advantages, one a token (on-policy distillation, Lu and Thinking Machines Lab 2025), with x = log
// p - log q of the sampled token, clamped to ±clamp, and 0 where masked:
//
//   a_t = base_t - coef Σ_{s >= t} discount^(s - t) x_s   over the rest of the sequence
//
// and 0 where masked. base: an advantage of the token's sequence, or its own; none: 0. Read:
// incorporate_kl_penalty in tinker_cookbook/distillation/train_on_policy.py and
// discounted_future_sum_vectorized in rl/metrics.py of thinking-machines-lab/tinker-cookbook
// 9dfcc3a2 (coef 1, discount 0; no clamp). log_probs, teacher_log_probs f32 [T]; base f32 [B] or
// [T]; sums in f64. A mask value other than 0 and 1 faults, and gives NaN for its token.
#pragma once
#include <tuple>

#include "ops/enums.h"
#include "ops/fault.h"
#include "ops/tensor.h"

namespace p2r {

struct DistillationArgs {
  In logits, teacher_logits, mask;
  Divergence objective = Divergence::reverse_kl;
  double beta = 0.5, temperature = 1;
  Out divergence;
  auto fields() {
    return std::tie(logits, teacher_logits, mask, objective, beta, temperature, divergence);
  }
  FaultFlag fault;
  FaultSource fault_source() const { return {}; }  // the mask alone can be at fault
};

struct DistillationBackwardArgs {
  In logits, teacher_logits, mask, d_divergence;
  Divergence objective = Divergence::reverse_kl;
  double beta = 0.5, temperature = 1;
  Out divergence, d_logits;
  auto fields() {
    return std::tie(logits, teacher_logits, mask, d_divergence, objective, beta, temperature,
                    divergence, d_logits);
  }
  FaultFlag fault;
  FaultSource fault_source() const { return {}; }
};

struct LinearDistillationArgs {
  In hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask;
  Divergence objective = Divergence::reverse_kl;
  double beta = 0.5, temperature = 1;
  Out divergence;
  auto fields() {
    return std::tie(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask,
                    objective, beta, temperature, divergence);
  }
  double work() const { return 1.0 * (hidden.size() + teacher_hidden.size()) * weight.shape[0]; }
  FaultFlag fault;
  FaultSource fault_source() const { return {}; }
};

struct LinearDistillationBackwardArgs {
  In hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask, d_divergence;
  Divergence objective = Divergence::reverse_kl;
  double beta = 0.5, temperature = 1;
  InOut into_weight, into_bias;
  Out divergence, d_hidden, d_weight, d_bias;
  auto fields() {
    return std::tie(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask,
                    d_divergence, objective, beta, temperature, into_weight, into_bias, divergence,
                    d_hidden, d_weight, d_bias);
  }
  double work() const { return (3.0 * hidden.size() + teacher_hidden.size()) * weight.shape[0]; }
  FaultFlag fault;
  FaultSource fault_source() const { return {}; }
};

struct DistillationAdvantagesArgs {
  In log_probs, teacher_log_probs, mask, base;
  Ints cu_seqlens;
  bool per_token = false;                    // base
  double coef = 1, discount = 0, clamp = 0;  // clamp 0: none
  Out advantages;
  auto fields() {
    return std::tie(log_probs, teacher_log_probs, mask, base, cu_seqlens, per_token, coef, discount,
                    clamp, advantages);
  }
  FaultFlag fault;
  FaultSource fault_source() const { return {}; }
};

}  // namespace p2r

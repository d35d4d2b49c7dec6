// Log-probabilities of given tokens under a linear head, and the policy loss through it, without
// the logits in memory:
//
//   logits [N, V] = hidden [N, C] . weight [V, C]^T + bias [V]
//
// and from there as ops/log_probs.h and ops/policy_loss.h say, which define log-probabilities,
// entropy, squared probabilities, stats, rows without a softmax, and the loss. With dz the gradient
// of the logits:
//
//   dhidden = dz . weight,  dweight = dz^T . hidden,  dbias = Σ_n dz[n]
//
// hidden, weight f32 | f16 | bf16 of one type; bias that type or f32; targets i32 [N]. Logits are
// f32 and never rounded to 16 bits, and so is dz on the CPU. CUDA multiplies hidden and weight of
// 16 bits on tensor cores, where C is a multiple of 8, with dz rounded to 16 bits too: there
// every term of the gradients' sums is off by at most the type's unit roundoff, with a power of two
// that keeps dz in the range of f16. dhidden is as hidden, dweight [V, C] and dbias [V] f32,
// written to d_weight and d_bias or added to into_weight and into_bias, of which one each is given
// (of the second none without a bias).
//
// Rows: target -100 is skipped: its hidden state is not read, its results and gradients are 0, and
// on the CPU it costs nothing. Backward, so is a row whose g and h are both 0. A target outside
// 0..V-1 faults: NaN for its row, and for all of dweight and dbias.
//
// Memory beside inputs and results, which does not grow with N: forward on the CPU some 5 MB and
// 0.5 MB a thread (1 MB where a 16-bit weight is converted before it is multiplied, more where C
// exceeds 4096); backward 15 MB and the same a thread, and a chunk of dz of at most 32 MB; on
// CUDA a chunk of at most 128 MB of logits and some 20 MB. The policy loss has a chunk of 128 MB of
// logits on both (of at least 32 rows, 12 on CUDA), so that reading and writing dweight once a
// chunk costs little compared to the products, and 12 bytes a token. On tensor cores the products
// are so fast that backward and the loss take 640 MB, half as much for dz, and some 200 MB of
// partial sums; forward has no logits in memory, and takes 7 MB. Chunks follow from the shapes
// alone, since the order of dweight's sums does; a call with fewer rows than a chunk takes less.
//
// The order of every sum follows from the shapes alone (dweight: and from which rows are skipped);
// forward, a row has the same bits in any batch, and on the CPU those of token_log_probs of
// the logits in f32. The vocabulary is cut into at most 128 spans of
// whole blocks, which are merged in order.
//
// The policy loss computes each logit once (three products, where linear_log_probs, policy_loss and
// linear_log_probs_backward take four): chunk by chunk the log-probabilities, the loss's gradient
// with respect to them, dz over the logits, and its products. That gradient must not depend on
// other tokens' log-probabilities, so objectives of sequences (gspo, luspo, gmpo, vespo) and of the
// batch (clip_cov, kl_cov, any with top_entropy) are refused. A masked token has its
// log-probability, unless its target is -100, and takes no part in the gradient's products on the
// CPU. Entropy is computed where entropy_coef is not 0.
//
// Source: cut cross-entropy (Wijmans et al. 2024) for logits that are never stored; the exact
// gradient, without its filter.
#pragma once
#include <tuple>

#include "ops/log_probs.h"
#include "ops/policy_loss.h"

namespace p2r {

struct LinearLogProbsArgs {
  In hidden, weight, bias, targets;
  double temperature = 1;
  Out log_probs, stats, entropy, squared_probs;  // one or both of the last two are absent
  auto fields() {
    return std::tie(hidden, weight, bias, targets, temperature, log_probs, stats, entropy,
                    squared_probs);
  }
  double work() const { return 1.0 * hidden.size() * weight.shape[0]; }
  FaultFlag fault;
  FaultSource fault_source() const { return {Invalid::target, weight.shape[0]}; }
};

struct LinearLogProbsBackwardArgs {
  In hidden, weight, bias, targets, stats, d_log_probs;
  In entropy, d_entropy;  // both or neither
  double temperature = 1;
  InOut into_weight, into_bias;
  Out d_hidden, d_weight, d_bias;
  auto fields() {
    return std::tie(hidden, weight, bias, targets, stats, d_log_probs, entropy, d_entropy,
                    temperature, into_weight, into_bias, d_hidden, d_weight, d_bias);
  }
  double work() const { return 3.0 * hidden.size() * weight.shape[0]; }
  FaultFlag fault;
  FaultSource fault_source() const { return {Invalid::target, weight.shape[0]}; }
};

// loss: its log_probs, entropy and their gradients stay empty; they are internal to the call.
struct LinearPolicyLossArgs {
  In hidden, weight, bias, targets;
  double temperature = 1;
  InOut into_weight, into_bias;
  PolicyLossArgs loss;
  Out log_probs, d_hidden, d_weight, d_bias;
  auto fields() {
    return std::tuple_cat(
        std::tie(hidden, weight, bias, targets, temperature, into_weight, into_bias), loss.fields(),
        std::tie(log_probs, d_hidden, d_weight, d_bias));
  }
  double work() const { return 3.0 * hidden.size() * weight.shape[0]; }
  FaultFlag fault;
  FaultSource fault_source() const { return {Invalid::target, weight.shape[0]}; }
};

}  // namespace p2r

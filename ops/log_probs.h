// Log-probabilities of given tokens, x = logits / temperature:
//
//   m = max x,  s = Σ e^(x-m),  logp = (x_y - m) - log s,  H = log s - Σ e^(x-m) (x-m) / s,
//   squared_probs = Σ p² = Σ e^(2(x-m)) / s²
//   dlogits_j = (1/temperature) [ g (1{j=y} - p_j) - h p_j (log p_j + H) ],  0 log 0 = 0
//
// logits [N, V] f32 | f16 | bf16; targets i32 [N]; log_probs, entropy, squared_probs,
// g = d_log_probs, h = d_entropy f32 [N]; of entropy and squared_probs a call gives one; stats f32
// [N, 2] = (m, log s). m is rounded to f32 first and s is relative to the rounded m, so that m +
// log s is right to the last digit of log s; the two are kept apart because their sum loses digits
// at large logits.
//
// Each logit is read once. The sums run in an order that depends on the column alone (fixed slices
// of a row, merged in order), never on N, the row's index or the number of threads: the same row
// gives the same bits in any batch. e^(x-m) and its sums are f32 in short runs; runs are added in
// f64 on the CPU, by a fixed tree in f32 on CUDA.
//
// Rows: target -100 is skipped: not read, log_probs = entropy = squared_probs = 0, stats = (0, 0),
// dlogits 0. A
// target outside 0..V-1 faults and gives NaN. A row with NaN or +inf, or of -inf alone, has no
// softmax: NaN, without a fault, since the cause is the model and not the caller. Columns of
// -inf add 0 to every sum; a target there gives -inf and a finite gradient. A row whose g and h are
// both 0 gets dlogits 0 and is not read.
//
// Shards: columns offset .. offset+V'-1 of a vocabulary. target_logit = x_y, or -inf where another
// shard holds it; moment = Σ e^(x-m) (x-m). A shard of no columns, or of -inf alone: (-inf, -inf),
// -inf, 0. A skipped row: (-inf, -inf), 0, 0, which is how the merge knows it. A shard cannot know
// where the vocabulary ends: only negative targets fault, and one that no shard holds merges to
// -inf. The merge is in f64, in the order given. Backward over a shard takes the merged stats.
//
// d_logits may be logits.
#pragma once
#include <tuple>
#include <vector>

#include "ops/enums.h"
#include "ops/fault.h"
#include "ops/tensor.h"

namespace p2r {

constexpr int32_t kSkippedTarget = -100;

struct TokenLogProbsArgs {
  In logits, targets;
  double temperature = 1;
  Out log_probs, stats, entropy, squared_probs;  // one or both of the last two are absent
  auto fields() {
    return std::tie(logits, targets, temperature, log_probs, stats, entropy, squared_probs);
  }
  FaultFlag fault;
  FaultSource fault_source() const { return {Invalid::target, logits.shape[1]}; }
};

// What the results of a forward pass take beside log-probabilities.
template <class Args>
SoftmaxExtra extra_of(const Args& a) {
  return a.entropy         ? SoftmaxExtra::moment
         : a.squared_probs ? SoftmaxExtra::squares
                           : SoftmaxExtra::none;
}

struct TokenLogProbsShardArgs {
  In logits, targets;
  int64_t vocab_offset = 0;
  double temperature = 1;
  Out stats, target_logit, moment;  // moment may be absent
  auto fields() {
    return std::tie(logits, targets, vocab_offset, temperature, stats, target_logit, moment);
  }
  FaultFlag fault;
  FaultSource fault_source() const { return {Invalid::shard_target}; }
};

struct MergeLogProbsArgs {
  std::vector<In> stats, target_logit, moment;  // moment may be empty
  Out log_probs, merged, entropy;
  auto fields() { return std::tie(stats, target_logit, moment, log_probs, merged, entropy); }
};

struct TokenLogProbsBackwardArgs {
  In logits, targets, stats, d_log_probs;
  In entropy, d_entropy;  // both or neither
  double temperature = 1;
  int64_t vocab_offset = 0;
  bool shard = false;  // targets past these columns belong to another shard
  Out d_logits;
  auto fields() {
    return std::tie(logits, targets, stats, d_log_probs, entropy, d_entropy, temperature,
                    vocab_offset, shard, d_logits);
  }
  FaultFlag fault;
  FaultSource fault_source() const {
    return {shard ? Invalid::shard_target : Invalid::target, logits.shape[1]};
  }
};

}  // namespace p2r

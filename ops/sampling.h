// One sample a row from softmax(logits / temperature), by inverting the cumulative distribution.
//
//   weight[i] = 2^S · 2^-((max - logits[i]) log2(e) / temperature), a whole number (ops/philox.h)
//   total     = Σ weight,   target = floor(total · u / 2^64)
//   out       = the smallest i whose weight[0] + ... + weight[i] exceeds target
//
// u: 64 bits of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)
// with the seed as key and the row as counter. Temperature 0 takes the largest logit, the first of
// equals. logits [N, V] f32 | f16 | bf16, V > 0 unless N is 0; out i32 [N]; seed 0 .. 2^53 - 1.
// After the one subtraction and one product in f32, which every machine rounds alike, all
// arithmetic is on integers. Sums of integers do not depend on their order, so every backend,
// instruction set and thread count draws the same tokens. A weight has a relative error of some
// 1e-7, plus 2^-S of the largest, S = 62 - log2(V) and at most 44. A logit of -infinity is never
// drawn. A row with NaN or +infinity, or of -infinity alone, faults and results in -1.
//
// sample_tokens: the same with settings and a seed for each row, and filters, which are applied in
// the order of Hugging Face's generation, each to what the one before has left:
//
//   z       = logits; for each token of the row's history z / penalty if z >= 0, else z penalty
//   top_k   keeps z >= the k-th largest z; all of k = 0
//   top_p   keeps the tokens, by falling z and of equals by rising i, before which the weights of
//           those kept so far are below top_p of the weights that top_k left; all of top_p = 1
//   min_p   keeps weights of at least min_p of the largest
//   token   = drawn from what is left, as above, by the row's own u: its seed and counter 0
//   log_prob          = log softmax(logits / temperature)[token], of all logits without a penalty
//   log_prob_filtered = log (weight[token] / Σ of what is left)
//
// At temperature 0 the token is the first of the largest z, log_prob is at temperature 1 and
// log_prob_filtered is 0. Without a history and filters log_prob_filtered is log_prob. A row's
// results depend on its logits and settings alone. Tokens are the same on every backend, since each
// decision compares f32 logits or sums of whole numbers; on the CPU log_prob is that of
// token_log_probs (ops/log_probs.h) and linear_log_probs, bit for bit. tokens i32 [R]; log_probs
// and log_probs_filtered f32 [R]. A row that faults gives -1, NaN and NaN.
#pragma once
#include <cmath>
#include <tuple>
#include <vector>

#include "ops/fault.h"
#include "ops/philox.h"
#include "ops/tensor.h"

namespace p2r {

struct SampleArgs {
  In logits;
  double temperature = 1;
  int64_t seed = 0;
  Out out;
  FaultFlag fault;
  FaultSource fault_source() const { return {Invalid::logits}; }
  auto fields() { return std::tie(logits, temperature, seed, out); }
  double work() const { return 256.0 * logits.shape[0]; }
};

// A row's seed is 0 .. 2^53 - 1, temperature, top_p and min_p are at least 0, penalty is above 0,
// top_p and min_p at most 1. history holds each token once; row r's are those from
// history_offsets[r] to history_offsets[r + 1] - 1.
struct SampleTokensArgs {
  In logits;
  Ints seed, top_k;
  std::vector<double> temperature, top_p, min_p, penalty;
  Ints history_offsets, history;
  Out tokens, log_probs, log_probs_filtered;
  FaultFlag fault;
  FaultSource fault_source() const { return {Invalid::logits}; }
  auto fields() {
    return std::tie(logits, seed, top_k, temperature, top_p, min_p, penalty, history_offsets,
                    history, tokens, log_probs, log_probs_filtered);
  }
  double work() const { return 16.0 * logits.size() + 4096.0 * logits.shape[0]; }
};

// One row's settings as kernels take them.
struct SampleRow {
  uint64_t random;      // u
  uint64_t top_p;       // 2^64 top_p; 0: off
  uint64_t min_weight;  // 0: off
  int64_t top_k;        // 0: off
  int64_t history_begin, history_end;
  double inverse;  // 1 / temperature; 1 where that is 0
  float rate;      // of the weights; 0 at temperature 0
  float penalty;

  constexpr bool has_history() const { return history_begin < history_end; }
  constexpr bool has_filter() const { return top_k || top_p || min_weight; }
};

inline SampleRow sample_row(const SampleTokensArgs& a, int64_t row) {
  const auto r = static_cast<size_t>(row);
  const int64_t v = a.logits.shape[1];
  const double temperature = a.temperature[r],
               weight_of_1 = static_cast<double>(weight(0, 1, weight_bits(v)));
  SampleRow s;
  s.random = philox(static_cast<uint64_t>(a.seed[r]), 0);
  s.top_p = a.top_p[r] < 1 ? static_cast<uint64_t>(std::ldexp(a.top_p[r], 64)) : 0;
  // A top_p that rounds to 0 keeps one token, as the smallest one does.
  if (a.top_p[r] < 1 && !s.top_p) s.top_p = 1;
  s.min_weight = static_cast<uint64_t>(std::ceil(a.min_p[r] * weight_of_1));
  s.top_k = a.top_k[r] < v ? a.top_k[r] : 0;
  s.history_begin = a.history_offsets[r];
  s.history_end = a.history_offsets[r + 1];
  s.inverse = temperature > 0 ? 1 / temperature : 1;
  s.rate = temperature > 0 ? weight_rate(temperature) : 0.0f;
  s.penalty = static_cast<float>(a.penalty[r]);
  return s;
}

constexpr float penalized(float z, float penalty) { return z >= 0 ? z / penalty : z * penalty; }

// ceil(mass top_p / 2^64), at least 1: what the kept tokens before the next have to stay below.
constexpr uint64_t mass_to_keep(uint64_t mass, uint64_t top_p) {
  const uint64_t whole = multiply_high(mass, top_p) + (mass * top_p != 0);
  return whole > 0 ? whole : 1;
}

}  // namespace p2r

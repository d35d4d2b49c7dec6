// Arguments of the SIMD kernels that are not plain lists: of log-probabilities, of divergences, of
// the policy loss, of rollout corrections and of sums of rows. Resampling has its own in
// cpu/simd/resample.h.
#pragma once
#include <stdint.h>

#include "ops/enums.h"

namespace p2r::cpu {

// Columns of a step of softmax_row and softmax_lanes; a multiple of every vector_width().
constexpr int64_t kSoftmaxColumns = 96;

// The gradient of one row of logits; see logit_gradient.
struct LogitGradientRow {
  float inverse, inverse_low;  // 1 / temperature, in two parts
  float maximum, log_sum;      // stats
  float scale_p, scale_h;
};

// The divergence of one row of a student's logits and a teacher's, in this order; see
// divergence_gradient.
struct DivergenceRow {
  Divergence objective;
  float beta;
  float inverse, inverse_low;    // 1 / temperature, in two parts
  float maximum[2], log_sum[2];  // stats of ops/log_probs.h
  float subtract;                // reverse_kl: D; jsd: KL(p||m)
  float scale;                   // of the gradient
};

// Of one call of divergence_sums and mixture_sums, at most.
constexpr int64_t kDivergenceRun = 4096;

constexpr int kMaxLanes = 16;  // of a vector of f32, on any instruction set

// A run of tokens within one sequence; absent inputs are null. ops/policy_loss.h has the formulas.
struct PolicyRun {
  const float *log_probs, *old_log_probs, *ref_log_probs, *entropy, *importance, *advantages;
  const uint8_t* mask;
  bool faulty;  // whether the mask has values other than 0 and 1
  float *d_log_probs, *d_entropy;
  int64_t n;
  Objective objective;
  Kl kl;
  float advantage;            // where advantages is null
  float low, high;            // the clipped ratio's bounds
  float clip_low, clip_high;  // dppo's thresholds, and gmpo's bounds on the log-ratio
  float delta;                // inf: none
  float dual_clip;            // inf: none
  float tau_positive, tau_negative;
  float phi_positive, phi_negative;  // vespo's weights of the sequence
  // clip_cov and kl_cov: the batch's means; which covariances are candidates, whose places in the
  // run are listed; whether the tokens of this run are chosen, and then there is no list, and the
  // sum of policy terms is what that changes.
  float mean_advantage, mean_log_prob, cov_low, cov_high, cov_kl;
  int32_t* candidates;  // room for n + kMaxLanes
  int64_t* candidate_count;
  bool chosen;
  float least_entropy;  // of a token with a policy term; -inf: none
  float kl_clamp;       // inf: none
  bool kl_unbiased;
  float sequence_ratio;             // gspo's and gmpo's
  bool sequence_inside;             // whether its logarithm was within its bounds
  float policy_weight;              // of a token's gradient
  float kl_weight, entropy_weight;  // with their coefficients; entropy's negative
};

// A run of tokens within one sequence; ops/rollout_correction.h has the formulas.
struct RolloutRun {
  const float *log_probs, *rollout_log_probs;
  const uint8_t* mask;  // or null
  float* weights;       // of level token, else not written
  uint8_t* kept;
  int64_t n;
  RatioLevel level;
  RatioMode mode;
  float low, high;
  const Rejection* rules;
  int rule_count;
};

enum class Arithmetic : uint8_t { add, mul };

// sum_rows: at most kSumColumns columns a call; kRowsPerRun is kSumRun of ops/rows.h.
constexpr int64_t kSumColumns = 64, kRowsPerRun = 64;

}  // namespace p2r::cpu

// The policy loss of one run of tokens: W tokens at a time, every branch on data a select. What is
// constant for a run is a template parameter or a well-predicted branch.
#include <math.h>

#include "cpu/simd/arguments.h"
#include "cpu/simd/simd.h"
#include "cpu/simd/tokens.h"
#include "cpu/simd/vec.h"

namespace p2r::cpu::P2R_ISA {

namespace {

constexpr int kPartial = 512;  // tokens whose terms are summed in f32

// Sums over tokens: terms in f32 for kPartial tokens, then in f64; counts as integers.
struct Totals {
  vf terms[kLossSums] = {};
  vi clipped = {}, dual_clipped = {};
};

// The negated advantage, and the dual clip's bound on the loss.
struct Advantage {
  vf negated, max_loss;
};
inline Advantage advantage_of(const PolicyRun& run, vf x) {
  return {-x, x < 0.0f ? -x * run.dual_clip : set1(INFINITY)};
}

// A loss term and its derivative with respect to the log-probability.
struct Term {
  vf value, gradient;
};

inline Term kl_term(const PolicyRun& run, vf x) {
  const vf one = set1(1);
  switch (run.kl) {
    case Kl::k1:
      return {-x, one};
    case Kl::k1_plus:
      return {-x, -x};
    case Kl::k2:
      return {0.5f * x * x, -x};
    case Kl::abs:
      return {x < 0.0f ? -x : x, x > 0.0f ? -one : x < 0.0f ? one : x};
    default: {
      const bool clamped = run.kl_clamp < INFINITY;
      const vf at = clamped ? clamp(x, -20, 20) : x;
      const vf value = expm1_minus_x(at, vexp(at));
      const vf bounded = value > run.kl_clamp ? set1(run.kl_clamp) : value;
      if (run.kl == Kl::k3_plus) return {bounded, -x};
      if (!clamped) return {value, -(value + at)};
      const vi beyond = (value > run.kl_clamp) | (x > 20.0f) | (x < -20.0f);
      return {bounded, beyond ? vf{} : -(value + at)};
    }
  }
}

// Whether the trust region of dppo excludes a token.
template <Objective objective>
inline vi outside_region(const PolicyRun& run, vf negated_advantage, vf log_p, vf log_q) {
  const vf p = vexp(log_p), q = vexp(log_q);
  const vi raises = negated_advantage < 0.0f;
  if (objective == Objective::dppo_tv) {
    const vf moved = p - q;
    return raises ? moved > run.clip_high : moved < -run.clip_low;
  }
  const vf not_p = -(expm1_minus_x(log_p, p) + log_p), not_q = -(expm1_minus_x(log_q, q) + log_q);
  const vf chosen = q > 0.0f ? q * (log_q - log_p) : vf{};
  const vf other = q > 0.0f ? not_q : set1(1);
  const vf not_p_or_1 = p > 0.0f ? not_p : set1(1);
  const vf divergence = chosen + other * vlog((other + 1e-8f) / (not_p_or_1 + 1e-8f));
  return raises ? (divergence > run.clip_high) & (p > q) : (divergence > run.clip_low) & (p < q);
}

// The covariance of clip_cov and kl_cov without its mean over tokens.
inline vf covariance(const PolicyRun& run, vf negated_advantage, vf log_p) {
  return (-negated_advantage - run.mean_advantage) * (log_p - run.mean_log_prob);
}

inline void list_candidates(const PolicyRun& run, vi which, int64_t i) {
  uint32_t left = lanes(which);
  for (; left; left &= left - 1)
    run.candidates[(*run.candidate_count)++] = (int32_t)i + __builtin_ctz(left);
}

// The n tokens from i on, at most W. Without `extras` the loss is the policy term alone, with one
// advantage and a valid mask, and the loop has no branches.
template <Objective objective, bool extras>
inline void add_tokens(const PolicyRun& run, Advantage advantage, int64_t i, int n, Totals& total) {
  const vf one = set1(1), none = {};
  const vi mark = load_marks(run.mask ? run.mask + i : nullptr, n);
  const vi keep = mark != 0;

  const vf log_p = load_floats(run.log_probs + i, n);
  if (extras && run.advantages) advantage = advantage_of(run, load_floats(run.advantages + i, n));
  const vf step = run.old_log_probs ? log_p - load_floats(run.old_log_probs + i, n) : none;
  const vf d = clamp(step, -20, 20);
  constexpr bool sequence = objective == Objective::gspo;
  vf ratio = one;
  if (sequence || objective == Objective::gmpo) {
    ratio = set1(run.sequence_ratio);
  } else if (run.old_log_probs) {
    const Exp2 power = exp2_factors(d, kLog2e);
    ratio = power.scale * power.rest;
  }
  const vf bounded = extras ? vmin(set1(run.delta), ratio) : ratio;
  const vf unclipped = advantage.negated * bounded;

  Term policy = {none, none};
  if (objective == Objective::ppo || sequence) {
    const vf clipped_loss = advantage.negated * clamp(ratio, run.low, run.high);
    const vi clipped = clipped_loss > unclipped;
    policy.value = clipped ? clipped_loss : unclipped;
    vi moves = sequence ? (run.sequence_inside ? keep : keep & 0) : d == step;
    if (!sequence) {
      const vi dual_clipped = policy.value > advantage.max_loss;
      policy.value = dual_clipped ? advantage.max_loss : policy.value;
      count(keep & dual_clipped, total.dual_clipped);
      moves &= ~dual_clipped;
    }
    count(keep & clipped, total.clipped);
    if (extras) {
      const vi beyond = (ratio > run.delta) & ~clipped;
      count(keep & beyond & moves, total.dual_clipped);
      moves &= ~beyond;
    }
    policy.gradient = moves & ~clipped ? unclipped : none;
  } else if (objective == Objective::dppo_tv || objective == Objective::dppo_kl) {
    const vf log_q = run.old_log_probs ? load_floats(run.old_log_probs + i, n) : log_p;
    const vi outside = outside_region<objective>(run, advantage.negated, log_p, log_q);
    const vf truncated = vmin(set1(run.delta), ratio);
    count(keep & outside, total.clipped);
    count(keep & ~outside & (ratio > run.delta), total.dual_clipped);
    policy.gradient = outside ? none : advantage.negated * truncated;
    policy.value = outside ? none : policy.gradient * log_p;
  } else if (objective == Objective::gmpo) {
    const vf most = advantage.negated < 0.0f ? set1(run.clip_high) : set1(INFINITY);
    const vf least = advantage.negated > 0.0f ? set1(-run.clip_low) : set1(-INFINITY);
    const vi high = step > most, low = step < least;
    count(keep & high, total.clipped);
    count(keep & low, total.dual_clipped);
    const vi moves = run.sequence_inside ? keep : keep & 0;
    policy.value = advantage.negated * ratio;
    policy.gradient = moves & ~high & ~low ? policy.value : none;
  } else if (objective == Objective::clip_cov) {
    const vf clipped_loss = advantage.negated * clamp(ratio, run.low, run.high);
    const vf own = advantage.negated * ratio;
    const vi clipped = clipped_loss > own;
    count(keep & clipped, total.clipped);
    if (run.chosen) {
      count(keep, total.dual_clipped);
    } else {
      policy.value = clipped ? clipped_loss : own;
      policy.gradient = (d == step) & ~clipped ? own : none;
      const vf cov = covariance(run, advantage.negated, log_p);
      list_candidates(run, keep & ~clipped & (cov > run.cov_low) & (cov < run.cov_high), i);
    }
  } else if (objective == Objective::kl_cov) {
    policy.value = advantage.negated * ratio;
    policy.gradient = d == step ? policy.value : none;
    if (run.chosen) {
      count(keep, total.dual_clipped);
      const vf away = d > 0.0f ? one : d < 0.0f ? -one : none;
      policy.value += run.cov_kl * d * away;
      policy.gradient += d == step ? run.cov_kl * away : none;
    } else {
      const vf cov = covariance(run, advantage.negated, log_p);
      list_candidates(run, keep & (cov >= run.cov_low), i);
    }
  } else if (objective == Objective::vespo) {
    const vf phi = advantage.negated > 0.0f ? set1(run.phi_negative) : set1(run.phi_positive);
    policy.gradient = advantage.negated * phi;
    policy.value = policy.gradient * log_p;
  } else if (objective == Objective::cispo) {
    const vf clipped_ratio = clamp(ratio, run.low, run.high);
    count(keep & (clipped_ratio != ratio), total.clipped);
    policy.gradient = advantage.negated * clipped_ratio;
    policy.value = policy.gradient * log_p;
  } else if (objective == Objective::sapo) {
    const vf tau = advantage.negated < 0.0f ? set1(run.tau_positive) : set1(run.tau_negative);
    const vf gate = one / (one + vexp(-tau * (ratio - 1.0f)));
    const vf away = one / (one + vexp(tau * (ratio - 1.0f)));
    policy.value = advantage.negated * gate * 4.0f / tau;
    policy.gradient = d == step ? advantage.negated * 4.0f * gate * away * ratio : none;
  } else {
    policy.gradient = advantage.negated;
    policy.value = policy.gradient * log_p;
  }
  if (extras && objective != Objective::vespo && run.importance) {
    const vf weight = load_floats(run.importance + i, n);
    policy.value *= weight;
    policy.gradient *= weight;
  }
  if (extras && run.least_entropy > -INFINITY) {
    const vi low = load_floats(run.entropy + i, n) < run.least_entropy;
    policy.value = low ? none : policy.value;
    policy.gradient = low ? none : policy.gradient;
  }
  vf gradient = policy.gradient * run.policy_weight;
  if (extras && run.faulty) {
    const vi wrong = mark > 1;
    policy.value = wrong ? set1(NAN) : policy.value;
    gradient = wrong ? set1(NAN) : gradient;
  }
  total.terms[kPolicySum] += keep ? policy.value : none;

  if (extras && run.kl != Kl::none) {
    Term kl = kl_term(run, load_floats(run.ref_log_probs + i, n) - log_p);
    if (run.kl_unbiased) {
      const vf token_ratio = vexp(d);
      kl.gradient = token_ratio * (kl.gradient + (d == step ? kl.value : none));
      kl.value *= token_ratio;
    }
    total.terms[kKlSum] += keep ? kl.value : none;
    if (run.kl_weight != 0) gradient += kl.gradient * run.kl_weight;
  }
  if (extras && run.entropy) {
    total.terms[kEntropySum] += keep ? load_floats(run.entropy + i, n) : none;
    store_floats(run.d_entropy + i, keep ? set1(run.entropy_weight) : none, n);
  }
  total.terms[kApproxKlSum] -= keep ? d : none;
  total.terms[kRatioSum] += keep ? ratio : none;
  store_floats(run.d_log_probs + i, keep ? gradient : none, n);
}

template <Objective objective, bool extras>
void tokens_of(const PolicyRun* pointer, double* sums) {
  const PolicyRun run = *pointer;  // a copy, which stores to the results cannot alias
  const Advantage shared = advantage_of(run, set1(run.advantage));
  vd_half terms[kLossSums] = {};
  vi clipped = {}, dual_clipped = {};
  for (int64_t begin = 0; begin < run.n; begin += kPartial) {
    const int64_t end = run.n - begin < kPartial ? run.n : begin + kPartial;
    Totals total;
    int64_t i = begin;
    for (; i + W <= end; i += W) add_tokens<objective, extras>(run, shared, i, W, total);
    if (i < end) add_tokens<objective, extras>(run, shared, i, (int)(end - i), total);
    for (int k : {kPolicySum, kApproxKlSum, kRatioSum}) add_to(&terms[k], total.terms[k]);
    if (extras && run.kl != Kl::none) add_to(&terms[kKlSum], total.terms[kKlSum]);
    if (extras && run.entropy) add_to(&terms[kEntropySum], total.terms[kEntropySum]);
    clipped += total.clipped;
    dual_clipped += total.dual_clipped;
  }
  for (int k : {kPolicySum, kKlSum, kEntropySum, kApproxKlSum, kRatioSum}) sums[k] = sum(terms[k]);
  int32_t counts[2] = {};
  for (int lane = 0; lane < W; ++lane) {
    counts[0] += clipped[lane];
    counts[1] += dual_clipped[lane];
  }
  sums[kClippedSum] = counts[0];
  sums[kDualClippedSum] = counts[1];
}

template <Objective objective>
void run_of(const PolicyRun* run, double* sums) {
  if (run->kl != Kl::none || run->entropy || run->importance || run->advantages || run->faulty ||
      run->delta < INFINITY)
    tokens_of<objective, true>(run, sums);
  else
    tokens_of<objective, false>(run, sums);
}

}  // namespace

void policy_run(const PolicyRun* run, double* sums) {
  switch (run->objective) {
    case Objective::ppo:
      return run_of<Objective::ppo>(run, sums);
    case Objective::gspo:
      return run_of<Objective::gspo>(run, sums);
    case Objective::cispo:
      return run_of<Objective::cispo>(run, sums);
    case Objective::sapo:
      return run_of<Objective::sapo>(run, sums);
    case Objective::dppo_tv:
      return run_of<Objective::dppo_tv>(run, sums);
    case Objective::dppo_kl:
      return run_of<Objective::dppo_kl>(run, sums);
    case Objective::gmpo:
      return run_of<Objective::gmpo>(run, sums);
    case Objective::vespo:
      return run_of<Objective::vespo>(run, sums);
    case Objective::clip_cov:
      return run_of<Objective::clip_cov>(run, sums);
    case Objective::kl_cov:
      return run_of<Objective::kl_cov>(run, sums);
    default:
      return run_of<Objective::gpg>(run, sums);
  }
}

double sum_log_ratios(const PolicyRun* pointer) {
  const PolicyRun run = *pointer;
  vd_half total = {};
  for (int64_t i = 0; i < run.n; i += W) {
    const int left = run.n - i < W ? (int)(run.n - i) : W;
    const vi keep = load_marks(run.mask ? run.mask + i : nullptr, left) != 0;
    vf x = load_floats(run.log_probs + i, left) - load_floats(run.old_log_probs + i, left);
    if (run.objective == Objective::vespo) x = clamp(x, -20, 20);
    if (run.objective == Objective::gmpo) {
      const vf a = run.advantages ? load_floats(run.advantages + i, left) : set1(run.advantage);
      const vf raised = vmin(set1(run.clip_high), x), lowered = vmax(set1(-run.clip_low), x);
      x = a > 0.0f ? raised : a < 0.0f ? lowered : a;
    }
    add_to(&total, keep ? x : vf{});
  }
  return sum(total);
}

double sum_kept(const float* x, const uint8_t* mask, int64_t n) {
  vd_half total = {};
  for (int64_t i = 0; i < n; i += W) {
    const int left = n - i < W ? (int)(n - i) : W;
    const vi keep = load_marks(mask ? mask + i : nullptr, left) != 0;
    add_to(&total, keep ? load_floats(x + i, left) : vf{});
  }
  return sum(total);
}

int64_t count_kept(const uint8_t* mask, int64_t n, bool* wrong) {
  typedef uint8_t vbytes __attribute__((vector_size(W * 4)));
  typedef uint64_t vwords __attribute__((vector_size(W * 4)));
  constexpr int64_t kBytes = W * 4;
  int64_t kept = 0, i = 0;
  vbytes beyond = {};
  while (n - i >= kBytes) {
    const int64_t end = n - i < 255 * kBytes ? n : i + 255 * kBytes;  // a byte counts to 255
    vbytes counts = {};
    for (; i + kBytes <= end; i += kBytes) {
      const vbytes marks = load<vbytes>(mask + i);
      counts += marks != 0 ? vbytes{} + 1 : vbytes{};
      beyond |= marks & 0xFE;
    }
    vwords words = (vwords)counts;
    words = (words & 0x00FF00FF00FF00FFu) + (words >> 8 & 0x00FF00FF00FF00FFu);
    words = (words & 0x0000FFFF0000FFFFu) + (words >> 16 & 0x0000FFFF0000FFFFu);
    words = (words & 0xFFFFFFFFu) + (words >> 32);
    for (int lane = 0; lane < W / 2; ++lane) kept += (int64_t)words[lane];
  }
  uint64_t high = 0;
  for (int lane = 0; lane < W / 2; ++lane) high |= ((vwords)beyond)[lane];
  for (; i < n; ++i) {
    kept += mask[i] != 0;
    high |= mask[i] & 0xFE;
  }
  *wrong |= high != 0;
  return kept;
}

}  // namespace p2r::cpu::P2R_ISA

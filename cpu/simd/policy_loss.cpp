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

// Of a trust region, the larger of p and q in the direction that the advantage wants: p where the
// advantage raises it, else q.
inline vf log_larger(Lanes raises, vf log_p, vf log_q) {
  return clamp(select(raises, log_p, log_q), -87, 88);
}

// Whether dppo_tv excludes a token, by p - q = p (1 - 1/r) = q (r - 1), for one exponential more.
inline Lanes far_in_tv(const PolicyRun& run, vf negated_advantage, vf log_p, vf log_q, vf ratio) {
  const vf one = set1(1);
  const Lanes raises = less(negated_advantage, vf{});
  const Exp2Parts e = exp2_parts(log_larger(raises, log_p, log_q), kLog2e);
  const vf larger = e.scale * e.excess + e.scale;
  const vf sign = select(raises, one, -one);
  const vf most = select(raises, set1(run.clip_high) * ratio, set1(run.clip_low));
  return less(most, larger * (ratio * sign - sign));
}

// Whether dppo_kl excludes a token, by D and its threshold times r where the advantage raises p,
// which needs no q = p / r. With x = (1 - q + 1e-8) / (1 - p + 1e-8) or its inverse, which is at
// least 1 in the advantage's direction: D = (1 - q) ln x - q d where p rises and -q d - (1 - q) ln
// x where it falls. 1 less the larger of p and q does not cancel, nor does that of the smaller,
// which adds their difference.
//
// An exponential, a logarithm and a division, which few tokens need: D <= (p - q)^2 / (p (1 - p)),
// its chi-squared divergence, and p (1 - log p) <= 1, so D <= (1 - 1/r)^2 / -log p. A token for
// which that is below the threshold, by 2 % for the sake of rounding, stays, as does one that moves
// the other way.
inline Lanes far_in_kl(const PolicyRun& run, vf negated_advantage, vf log_p, vf log_q, vf ratio,
                       Lanes unclamped) {
  const vf one = set1(1), none = {};
  const Lanes raises = less(negated_advantage, none);
  const vf sign = select(raises, one, -one);
  const vf threshold = select(raises, set1(run.clip_high), set1(run.clip_low));
  const vf away = ratio * sign - sign;
  const vf enough = threshold * ratio * ratio * (log_p * -0.98f);
  const Lanes open = less(none, away) & ~(unclamped & less(away * away, enough));
  if (lanes(open) == 0) return open;
  const Exp2Parts e = exp2_parts<true>(log_larger(raises, log_p, log_q), kLog2e);
  const vf larger = e.scale * e.excess + e.scale, times = select(raises, ratio, one);
  const vf least = ((one - e.scale) - e.scale * e.excess + 1e-8f) * times;
  const vf most = least + larger * away, x = most / least;
  const vf divergence =
      select(raises, most, -least) * log_from_1(x) - larger * vmin(set1(20), log_p - log_q);
  return open & less(threshold * times, divergence) & less(none, x);
}

// The covariance of clip_cov and kl_cov without its mean over tokens.
inline vf covariance(const PolicyRun& run, vf negated_advantage, vf log_p) {
  return (-negated_advantage - run.mean_advantage) * (log_p - run.mean_log_prob);
}

// Some are in one vector of a dozen, at random: a branch would be mispredicted each time.
inline void list_candidates(const PolicyRun& run, Lanes which, int64_t i, int64_t& count) {
#if defined(__AVX512F__)
  if (which == 0) return;
  vi places;
  for (int lane = 0; lane < W; ++lane) places[lane] = lane;
  places += (int32_t)i;
  _mm512_storeu_si512(run.candidates + count, _mm512_maskz_compress_epi32(which, (__m512i)places));
  count += __builtin_popcount(which);
#else
  for (uint32_t left = lanes(which); left; left &= left - 1)
    run.candidates[count++] = (int32_t)i + __builtin_ctz(left);
#endif
}

// The n tokens from i on, at most W. Without `extras` the loss is the policy term alone, with one
// advantage and a valid mask, and the loop has no branches on data but dppo_kl's.
template <Objective objective, bool extras>
inline void add_tokens(const PolicyRun& run, Advantage advantage, int64_t i, int n, Totals& total,
                       int64_t& candidates) {
  const vf one = set1(1), none = {};
  const Lanes keep = load_kept(run.mask ? run.mask + i : nullptr, n);

  const vf log_p = load_floats(run.log_probs + i, n);
  if (extras && run.advantages) advantage = advantage_of(run, load_floats(run.advantages + i, n));
  const vf log_q = run.old_log_probs ? load_floats(run.old_log_probs + i, n) : log_p;
  const vf step = run.old_log_probs ? log_p - log_q : none;
  const vf d = clamp(step, -20, 20);
  const Lanes unclamped = equal(d, step);
  constexpr bool sequence = objective == Objective::gspo;
  vf ratio = one;
  if (sequence || objective == Objective::gmpo) {
    ratio = set1(run.sequence_ratio);
  } else if (run.old_log_probs) {
    const Exp2Parts power = exp2_parts(d, kLog2e);
    ratio = power.scale * power.excess + power.scale;
  }
  const vf bounded = extras ? vmin(set1(run.delta), ratio) : ratio;
  const vf unclipped = advantage.negated * bounded;

  Term policy = {none, none};
  if (objective == Objective::ppo || sequence) {
    const vf clipped_loss = advantage.negated * clamp(ratio, run.low, run.high);
    const Lanes clipped = less(unclipped, clipped_loss);
    policy.value = vmax(clipped_loss, unclipped);
    Lanes moves = sequence ? (run.sequence_inside ? keep : keep & 0) : unclamped;
    if (!sequence) {
      const Lanes dual_clipped = less(advantage.max_loss, policy.value);
      policy.value = vmin(advantage.max_loss, policy.value);
      count(keep & dual_clipped, total.dual_clipped);
      moves &= ~dual_clipped;
    }
    count(keep & clipped, total.clipped);
    if (extras) {
      const Lanes beyond = less(set1(run.delta), ratio) & ~clipped;
      count(keep & beyond & moves, total.dual_clipped);
      moves &= ~beyond;
    }
    policy.gradient = select(moves & ~clipped, unclipped, none);
  } else if (objective == Objective::dppo_tv || objective == Objective::dppo_kl) {
    const Lanes outside = objective == Objective::dppo_kl
                              ? far_in_kl(run, advantage.negated, log_p, log_q, ratio, unclamped)
                              : far_in_tv(run, advantage.negated, log_p, log_q, ratio);
    const vf truncated = vmin(set1(run.delta), ratio);
    count(keep & outside, total.clipped);
    count(keep & ~outside & less(set1(run.delta), ratio), total.dual_clipped);
    policy.gradient = select(outside, none, advantage.negated * truncated);
    policy.value = select(outside, none, policy.gradient * log_p);
  } else if (objective == Objective::gmpo) {
    const vf most = select(less(advantage.negated, none), set1(run.clip_high), set1(INFINITY));
    const vf least = select(less(none, advantage.negated), set1(-run.clip_low), set1(-INFINITY));
    const Lanes high = less(most, step), low = less(step, least);
    count(keep & high, total.clipped);
    count(keep & low, total.dual_clipped);
    const Lanes moves = run.sequence_inside ? keep : keep & 0;
    policy.value = advantage.negated * ratio;
    policy.gradient = select(moves & ~high & ~low, policy.value, none);
  } else if (objective == Objective::clip_cov) {
    const vf clipped_loss = advantage.negated * clamp(ratio, run.low, run.high);
    const vf own = advantage.negated * ratio;
    const Lanes inside = not_less(own, clipped_loss);
    count(keep & ~inside, total.clipped);
    if (extras && run.chosen) {
      policy.value = -vmax(clipped_loss, own);
    } else {
      policy.value = vmax(clipped_loss, own);
      policy.gradient = select(unclamped & inside, own, none);
      const vf cov = covariance(run, advantage.negated, log_p);
      const Lanes which =
          keep & inside & less(set1(run.cov_low), cov) & less(cov, set1(run.cov_high));
      list_candidates(run, which, i, candidates);
    }
  } else if (objective == Objective::kl_cov) {
    policy.value = advantage.negated * ratio;
    policy.gradient = select(unclamped, policy.value, none);
    if (extras && run.chosen) {
      const vf away = select(less(none, d), one, select(less(d, none), -one, none));
      policy.value = run.cov_kl * d * away;
      policy.gradient += select(unclamped, run.cov_kl * away, none);
    } else {
      const vf cov = covariance(run, advantage.negated, log_p);
      const Lanes below = less(cov, set1(run.cov_low)), number = equal(cov, cov);
      list_candidates(run, keep & number & ~below, i, candidates);
    }
  } else if (objective == Objective::vespo) {
    const vf phi =
        select(less(none, advantage.negated), set1(run.phi_negative), set1(run.phi_positive));
    policy.gradient = advantage.negated * phi;
    policy.value = policy.gradient * log_p;
  } else if (objective == Objective::cispo) {
    const vf clipped_ratio = clamp(ratio, run.low, run.high);
    count(keep & ~equal(clipped_ratio, ratio), total.clipped);
    policy.gradient = advantage.negated * clipped_ratio;
    policy.value = policy.gradient * log_p;
  } else if (objective == Objective::sapo) {
    const vf tau =
        select(less(advantage.negated, none), set1(run.tau_positive), set1(run.tau_negative));
    const vf gate = one / (one + vexp(-tau * (ratio - 1.0f)));
    const vf away = one / (one + vexp(tau * (ratio - 1.0f)));
    policy.value = advantage.negated * gate * 4.0f / tau;
    policy.gradient = select(unclamped, advantage.negated * 4.0f * gate * away * ratio, none);
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
    const Lanes low = less(load_floats(run.entropy + i, n), set1(run.least_entropy));
    policy.value = select(low, none, policy.value);
    policy.gradient = select(low, none, policy.gradient);
  }
  vf gradient = policy.gradient * run.policy_weight;
  if (extras && run.faulty) {
    const vi wrong = load_marks(run.mask + i, n) > 1;
    policy.value = wrong ? set1(NAN) : policy.value;
    gradient = wrong ? set1(NAN) : gradient;
  }
  total.terms[kPolicySum] += select(keep, policy.value, none);

  if (extras && run.kl != Kl::none) {
    Term kl = kl_term(run, load_floats(run.ref_log_probs + i, n) - log_p);
    if (run.kl_unbiased) {
      const vf token_ratio = vexp(d);
      kl.gradient = token_ratio * (kl.gradient + select(unclamped, kl.value, none));
      kl.value *= token_ratio;
    }
    total.terms[kKlSum] += select(keep, kl.value, none);
    if (run.kl_weight != 0) gradient += kl.gradient * run.kl_weight;
  }
  if (extras && run.entropy) {
    total.terms[kEntropySum] += select(keep, load_floats(run.entropy + i, n), none);
    store_floats(run.d_entropy + i, select(keep, set1(run.entropy_weight), none), n);
  }
  total.terms[kApproxKlSum] -= select(keep, d, none);
  total.terms[kRatioSum] += select(keep, ratio, none);
  store_floats(run.d_log_probs + i, select(keep, gradient, none), n);
}

template <Objective objective, bool extras>
void tokens_of(const PolicyRun* pointer, double* sums) {
  const PolicyRun run = *pointer;  // a copy, which stores to the results cannot alias
  const Advantage shared = advantage_of(run, set1(run.advantage));
  vd_half terms[kLossSums] = {};
  vi clipped = {}, dual_clipped = {};
  int64_t candidates = 0;
  for (int64_t begin = 0; begin < run.n; begin += kPartial) {
    const int64_t end = run.n - begin < kPartial ? run.n : begin + kPartial;
    Totals total;
    int64_t i = begin;
    for (; i + W <= end; i += W)
      add_tokens<objective, extras>(run, shared, i, W, total, candidates);
    if (i < end) add_tokens<objective, extras>(run, shared, i, (int)(end - i), total, candidates);
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
  if (run.candidate_count) *run.candidate_count = candidates;
  sums[kClippedSum] = counts[0];
  sums[kDualClippedSum] = counts[1];
}

template <Objective objective>
void run_of(const PolicyRun* run, double* sums) {
  // dppo's delta is no extra.
  constexpr bool bounds_ratio = objective != Objective::dppo_tv && objective != Objective::dppo_kl;
  if (run->kl != Kl::none || run->entropy || run->importance || run->advantages || run->faulty ||
      (bounds_ratio && run->delta < INFINITY))
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

double choose_token(const PolicyRun* run, int64_t i) {
  const Advantage shared = advantage_of(*run, set1(run->advantage));
  Totals total;
  int64_t candidates = 0;
  if (run->objective == Objective::clip_cov)
    add_tokens<Objective::clip_cov, true>(*run, shared, i, 1, total, candidates);
  else
    add_tokens<Objective::kl_cov, true>(*run, shared, i, 1, total, candidates);
  return total.terms[kPolicySum][0];
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
  const auto kept = [&](int64_t i, int left) {
    return select(load_kept(mask ? mask + i : nullptr, left), load_floats(x + i, left), vf{});
  };
  int64_t i = 0;
  // Four in f32: a conversion to f64 costs more than all else.
  for (; i + 4 * W <= n; i += 4 * W) {
    // Further than the processor looks ahead: this loop is as fast as its loads.
    for (int k = 0; k < 4 * W; k += 16) __builtin_prefetch(x + i + 1024 + k);
    add_to(&total, (kept(i, W) + kept(i + W, W)) + (kept(i + 2 * W, W) + kept(i + 3 * W, W)));
  }
  for (; i < n; i += W) add_to(&total, kept(i, n - i < W ? (int)(n - i) : W));
  return sum(total);
}

namespace {

// e^x - x - 1 in f64, to 1e-10 of itself: x = n ln 2 + r, and the series of e^r - 1 - r times 2^n,
// to which what is left of the terms below is added. At n = 0 that is nothing, so nothing cancels.
inline vd_half expm1_minus_x(vd_half x) {
  typedef int64_t vl_half __attribute__((vector_size(W * 4)));
  const vd_half bounded = x < -708.0 ? vd_half{} - 708.0 : x > 710.0 ? vd_half{} + 710.0 : x;
  const vd_half shifted = bounded * 1.4426950408889634 + 0x1.8p52, n = shifted - 0x1.8p52;
  const vd_half power = (vd_half)(((vl_half)shifted << 52) + (1023LL << 52));
  const vd_half r = (bounded - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  vd_half p = r * (1.0 / 39916800) + 1.0 / 3628800;
  for (double term :
       {1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 1.0 / 2})
    p = p * r + term;
  return power * (p * r * r) + (power - 1.0) + (power * r - x);
}

template <Kl kl>
double kl_sum_of(const float* log_probs, const float* ref, const uint8_t* mask, int64_t n,
                 double kl_clamp, bool* wrong) {
  const bool clamped = kl_clamp < INFINITY;
  vd_half totals[2] = {};
  vi beyond = {};
  const auto add = [&](int64_t i, int left) {
    const vi mark = load_marks(mask ? mask + i : nullptr, left);
    beyond |= mark > 1;
    vf part[2] = {load_floats(log_probs + i, left), load_floats(ref + i, left)};
    vf_half half[2][2];
    for (int k = 0; k < 2; ++k) {
      part[k] = mark != 0 ? part[k] : vf{};  // every estimate is 0 of 0
      memcpy(half[k], &part[k], sizeof half[k]);
    }
    for (int k = 0; k < 2; ++k) {
      vd_half x = __builtin_convertvector(half[1][k], vd_half) -
                  __builtin_convertvector(half[0][k], vd_half);
      if (kl == Kl::k1) {
        totals[k] -= x;
      } else if (kl == Kl::k2) {
        totals[k] += x * x * 0.5;
      } else if (kl == Kl::abs) {
        totals[k] += x < 0.0 ? -x : x;
      } else {
        if (clamped) x = x > 20.0 ? vd_half{} + 20.0 : x < -20.0 ? vd_half{} - 20.0 : x;
        const vd_half value = expm1_minus_x(x);
        totals[k] += value > kl_clamp ? vd_half{} + kl_clamp : value;
      }
    }
  };
  int64_t i = 0;
  for (; i + W <= n; i += W) add(i, W);
  if (i < n) add(i, (int)(n - i));
  *wrong = lanes(beyond) != 0;
  return sum(totals[0] + totals[1]);
}

}  // namespace

double kl_sum(Kl kl, const float* log_probs, const float* ref, const uint8_t* mask, int64_t n,
              double kl_clamp, bool* wrong) {
  switch (kl) {
    case Kl::k1:
    case Kl::k1_plus:
      return kl_sum_of<Kl::k1>(log_probs, ref, mask, n, kl_clamp, wrong);
    case Kl::k2:
      return kl_sum_of<Kl::k2>(log_probs, ref, mask, n, kl_clamp, wrong);
    case Kl::abs:
      return kl_sum_of<Kl::abs>(log_probs, ref, mask, n, kl_clamp, wrong);
    default:
      return kl_sum_of<Kl::k3>(log_probs, ref, mask, n, kl_clamp, wrong);
  }
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

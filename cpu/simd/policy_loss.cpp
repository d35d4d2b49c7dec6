// The policy loss of one run of tokens: W tokens at a time, every branch a select.
#include <math.h>

#include "cpu/simd/rows.h"
#include "cpu/simd/simd.h"
#include "cpu/simd/vec.h"

namespace p2r::cpu::P2R_ISA {

namespace {

typedef uint8_t vb __attribute__((vector_size(W)));

// As in ops/policy_loss.h, which this file may not include.
enum { kPpo, kGspo, kCispo, kSapo, kGpg };
enum { kNone, kK1, kK2, kK3, kAbs };

constexpr int kPartial = 256;  // tokens whose terms are summed in f32

struct Term {
  vf value, slope;
};

inline vf clamp(vf x, float low, float high) {
  x = x > high ? set1(high) : x;
  return x < low ? set1(low) : x;
}
inline vf load_floats(const float* p, int n) { return n == W ? loadf(p) : load_first<vf>(p, n); }
inline void store_floats(float* p, vf x, int n) {
  if (n == W)
    store(p, x);
  else
    store_first(p, x, n);
}

// e^x - x - 1, by its series near 0, where the difference would cancel.
inline vf above_tangent(vf x, vf e) {
  vf p = set1(1.0f / 6227020800.0f);
  const float terms[] = {1.0f / 479001600, 1.0f / 39916800, 1.0f / 3628800, 1.0f / 362880,
                         1.0f / 40320,     1.0f / 5040,     1.0f / 720,     1.0f / 120,
                         1.0f / 24,        1.0f / 6,        1.0f / 2};
  for (float term : terms) p = p * x + term;
  const vi near = (x > -1.0f) & (x < 1.0f);
  return near ? x * x * p : e - x - 1.0f;
}

inline Term kl_term(const PolicyRun& run, vf x) {
  const vf one = set1(1);
  switch (run.kl) {
    case kK1:
      return {-x, one};
    case kK2:
      return {0.5f * x * x, -x};
    case kAbs:
      return {x < 0.0f ? -x : x, x > 0.0f ? -one : x < 0.0f ? one : x};
    default: {
      const bool bounded = run.kl_clamp < INFINITY;
      const vf at = bounded ? clamp(x, -20, 20) : x;
      const vf value = above_tangent(at, vexp(at));
      if (!bounded) return {value, -(value + at)};
      const vi beyond = (value > run.kl_clamp) | (x > 20.0f) | (x < -20.0f);
      return {value > run.kl_clamp ? set1(run.kl_clamp) : value, beyond ? vf{} : -(value + at)};
    }
  }
}

}  // namespace

void policy_run(const PolicyRun* pointer, double* sums) {
  const PolicyRun run = *pointer;
  const vf nan = set1(NAN), one = set1(1), none = {};
  for (int k = 0; k < kPolicySums; ++k) sums[k] = 0;
  for (int64_t begin = 0; begin < run.n; begin += kPartial) {
    const int64_t end = run.n - begin < kPartial ? run.n : begin + kPartial;
    vf total[kPolicySums] = {};
    for (int64_t i = begin; i < end; i += W) {
      const int n = end - i < W ? (int)(end - i) : W;
      vb mask = {};
      if (run.mask)
        memcpy(&mask, run.mask + i, n);
      else
        memset(&mask, 1, n);
      const vi mark = __builtin_convertvector(mask, vi);
      const vi keep = mark != 0, wrong = mark > 1;

      const vf log_p = load_floats(run.log_probs + i, n);
      const vf advantage =
          run.advantages ? load_floats(run.advantages + i, n) : set1(run.advantage);
      const vf step = run.old_log_probs ? log_p - load_floats(run.old_log_probs + i, n) : none;
      const vf d = clamp(step, -20, 20);
      const bool sequence = run.objective == kGspo;
      const vi inside =
          sequence ? (run.sequence_inside ? keep : keep & 0) : (step >= -20.0f) & (step <= 20.0f);
      const vf ratio = sequence ? set1(run.sequence_ratio) : run.old_log_probs ? vexp(d) : one;

      Term policy = {none, none};
      vi clipped = keep & 0, lower = keep & 0;
      switch (run.objective) {
        case kPpo:
        case kGspo: {
          const vf free = -advantage * ratio;
          const vf bounded = -advantage * clamp(ratio, run.low, run.high);
          clipped = bounded > free;
          policy.value = clipped ? bounded : free;
          if (!sequence && run.dual_clip < INFINITY) {
            const vf most = -advantage * run.dual_clip;
            lower = (advantage < 0.0f) & (policy.value > most);
            policy.value = lower ? most : policy.value;
          }
          policy.slope = inside & ~clipped & ~lower ? free : none;
          break;
        }
        case kCispo: {
          const vf held = clamp(ratio, run.low, run.high);
          clipped = held != ratio;
          policy.slope = -advantage * held;
          policy.value = policy.slope * log_p;
          break;
        }
        case kSapo: {
          const vf tau = advantage > 0.0f ? set1(run.tau_positive) : set1(run.tau_negative);
          const vf gate = one / (one + vexp(-tau * (ratio - 1.0f)));
          const vf away = one / (one + vexp(tau * (ratio - 1.0f)));
          policy.value = -advantage * gate * 4.0f / tau;
          policy.slope = inside ? -advantage * 4.0f * gate * away * ratio : none;
          break;
        }
        default:
          policy.slope = -advantage;
          policy.value = policy.slope * log_p;
      }
      if (run.importance) {
        const vf weight = load_floats(run.importance + i, n);
        policy.value *= weight;
        policy.slope *= weight;
      }
      vf slope = policy.slope * run.policy_weight;
      total[kPolicy] += wrong ? nan : keep ? policy.value : none;

      if (run.kl != kNone) {
        const Term kl = kl_term(run, load_floats(run.ref_log_probs + i, n) - log_p);
        total[kKl] += keep ? kl.value : none;
        if (run.kl_weight != 0) slope += kl.slope * run.kl_weight;
      }
      if (run.entropy) {
        total[kEntropy] += keep ? load_floats(run.entropy + i, n) : none;
        store_floats(run.d_entropy + i, keep ? set1(run.entropy_weight) : none, n);
      }
      total[kClipped] += keep & clipped ? one : none;
      total[kClippedLower] += keep & lower ? one : none;
      total[kApproxKl] += keep ? -d : none;
      total[kRatio] += keep ? ratio : none;
      store_floats(run.d_log_probs + i, wrong ? nan : keep ? slope : none, n);
    }
    for (int k = 0; k < kPolicySums; ++k) sums[k] += sum(total[k]);
  }
}

}  // namespace p2r::cpu::P2R_ISA

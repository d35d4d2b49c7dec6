// The specimens, correct and with planted bugs: the correct ones must pass under every schedule,
// and each bug must be detected under at least one. Bugs that only TSan detects run in its build
// alone. Usage: mutants [-v]      (-v lists the schedules that detected the bug)
//        mutants --bench   times an attention kernel instead
#include <algorithm>
#include <chrono>
#include <cmath>

#include "test/twin/harness.h"
#include "test/twin/specimens/attention.cuh"
#include "test/twin/specimens/gemm.cuh"
#include "test/twin/specimens/log_sum_exp.cuh"
#include "test/twin/specimens/scale_tiles.cuh"
#include "test/twin/specimens/segment_stats.cuh"

HARNESS_SANITIZER_OPTIONS

namespace {

using namespace specimens;
using harness::Buffer;
using harness::small_value;
using bf16 = __nv_bfloat16;

bool near(double want, double got, double absolute, double relative) {
  return want == got || std::fabs(want - got) <= absolute + relative * std::fabs(want);
}

Buffer<bf16>& fill(Buffer<bf16>& b, float scale = 1.f, uint32_t salt = 0) {
  for (size_t i = 0; i < b.size(); ++i)
    b[i] = __float2bfloat16(scale * small_value(uint32_t(i) + salt));
  return b;
}

template <int Bug>
bool run_log_sum_exp() {
  for (const int n : {1, 9, 255, 2051}) {
    const int rows = 2, offset = n % 5, pitch = n + (n & 1);
    Buffer<bf16> x(size_t(offset + pitch * (rows - 1) + n));
    Buffer<float> out(rows, NAN);
    fill(x);
    launch(log_sum_exp<256, Bug>, rows, 256, 0, nullptr, x.get() + offset, out.get(), n, pitch);
    for (int r = 0; r < rows; ++r) {
      double sum = 0;
      for (int i = 0; i < n; ++i)
        sum += std::exp(__bfloat162float(x[size_t(offset + r * pitch + i)]));
      if (!near(std::log(sum), out[size_t(r)], 1e-5, 2e-5)) return false;
    }
  }
  return true;
}

template <int D, bool Causal, int Bug>
bool run_attention(int heads, int nq, int nk) {
  Buffer<bf16> q(size_t(heads * nq * D)), k(size_t(heads * nk * D)), v(size_t(heads * nk * D));
  Buffer<bf16> o(size_t(heads * nq * D), __float2bfloat16(NAN));
  Buffer<float> lse(size_t(heads * nq), NAN);
  fill(q, 0.25f), fill(k, 0.25f, 99), fill(v, 0.25f, 777);
  const double scale = 1 / std::sqrt(double(D));
  launch(attention<bf16, D, Causal, Bug>, dim3(unsigned(nq + 63) / 64, unsigned(heads)), 128,
         attention_smem<D>, nullptr, q.get(), k.get(), v.get(), o.get(), lse.get(), nq, nk,
         float(scale * 1.4426950408889634));
  for (int h = 0; h < heads; ++h)
    for (int i = 0; i < nq; ++i) {
      const int seen = Causal ? std::clamp(i + nk - nq + 1, 0, nk) : nk;
      std::vector<double> weight(static_cast<size_t>(nk)), want(D);
      double total = 0;
      for (int j = 0; j < seen; ++j) {
        double dot = 0;
        for (int d = 0; d < D; ++d)
          dot += double(__bfloat162float(q[size_t((h * nq + i) * D + d)])) *
                 double(__bfloat162float(k[size_t((h * nk + j) * D + d)]));
        total += weight[size_t(j)] = std::exp(dot * scale);
      }
      for (int j = 0; j < seen; ++j)
        for (int d = 0; d < D; ++d)
          want[size_t(d)] +=
              weight[size_t(j)] / total * double(__bfloat162float(v[size_t((h * nk + j) * D + d)]));
      // P and the result are rounded to bf16: 2^-9 each, of values below 2.
      for (int d = 0; d < D; ++d)
        if (!near(want[size_t(d)], __bfloat162float(o[size_t((h * nq + i) * D + d)]), 0x1p-8,
                  0x1p-8))
          return false;
      if (!near(std::log(total), lse[size_t(h * nq + i)], 1e-4, 1e-4)) return false;
    }
  return true;
}

template <bool NMajor, int Bug>
bool run_gemm(int m, int n, int k) {
  Buffer<bf16> a(size_t(m * k)), b(size_t(n * k));
  Buffer<float> c(size_t(m * n), NAN);
  fill(a), fill(b, 1.f, 31);
  const auto ta = make_tensor_map<bf16, 2>(a.get(), {uint64_t(k), uint64_t(m)}, {uint64_t(k) * 2},
                                           {64, 64}, Swizzle::b128);
  const uint64_t inner = uint64_t(NMajor ? n : k), outer = uint64_t(NMajor ? k : n);
  const auto tb =
      make_tensor_map<bf16, 2>(b.get(), {inner, outer}, {inner * 2}, {64, 64}, Swizzle::b128);
  launch(gemm<NMajor, Bug>, dim3(unsigned(n + 63) / 64, unsigned(m + 63) / 64), 160, gemm_smem,
         nullptr, ta, tb, c.get(), m, n, k);
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      float want = 0;
      for (int x = 0; x < k; ++x)
        want += __bfloat162float(a[size_t(i * k + x)]) *
                __bfloat162float(b[size_t(NMajor ? x * n + j : j * k + x)]);
      if (c[size_t(i * n + j)] != want) return false;
    }
  return true;
}

template <int Bug>
bool run_segment_stats() {
  for (const int n : {1, 31, 1000, 2503}) {
    const int groups = 7;
    std::vector<int> group(static_cast<size_t>(n));
    std::vector<float> x(static_cast<size_t>(n));
    std::vector<unsigned> count(groups), want_count(groups);
    std::vector<float> sum(groups), want_sum(groups);
    std::vector<int> largest(groups, -2147483647), want_largest = largest;
    for (int i = 0; i < n; ++i) {
      const size_t g = (uint32_t(i) * 2654435761u >> 16) % groups, at = size_t(i);
      group[at] = int(g);
      x[at] = small_value(uint32_t(i)) / 8;
      ++want_count[g];
      want_sum[g] += x[at];
      want_largest[g] = std::max(want_largest[g], int(std::floor(x[at] * 1000.f)));
    }
    launch(segment_stats<Bug>, unsigned(n + 1023) / 1024, 128, groups * 12, nullptr, group.data(),
           x.data(), n, groups, count.data(), sum.data(), largest.data());
    if (count != want_count || sum != want_sum || largest != want_largest) return false;
  }
  return true;
}

template <int Bug>
bool run_scale_tiles() {
  const int rows = 13, cols = 200;
  Buffer<float> x(rows * cols), y(rows * cols, 1.f);
  for (size_t i = 0; i < x.size(); ++i) x[i] = small_value(uint32_t(i));
  const auto map =
      make_tensor_map<float, 2>(y.get(), {cols, rows}, {cols * 4}, {64, 8}, Swizzle::none);
  launch(scale_tiles<Bug>, 2, 64, 8 * 64 * 4, nullptr, x.get(), map, rows, cols);
  for (size_t i = 0; i < x.size(); ++i)
    if (y[i] != 1.f + 2.f * x[i]) return false;
  return true;
}

int passed = 0, failed = 0;
bool verbose = false;

void report(bool good, const std::string& name, const std::string& detail) {
  ++(good ? passed : failed);
  printf("%s %-44s %s\n", good ? "ok  " : "FAIL", name.c_str(), detail.c_str());
}

void must_pass(const char* name, bool (*work)()) {
  std::string problem;
  for (const auto& s : harness::all_schedules()) {
    const std::string said = harness::outcome([&] {
      harness::apply(s);
      return work();
    });
    if (said != "ok") problem += " " + harness::name(s) + ": " + said;
  }
  report(problem.empty(), name, problem.empty() ? "right in all schedules" : problem);
}

enum Needs { any_build, tsan_build };

void must_notice(const char* name, bool (*work)(), Needs needs = any_build) {
#if !SIMT_TSAN
  if (needs == tsan_build) {
    printf("skip %-44s only TSan can see it\n", name);
    return;
  }
#else
  (void)needs;
#endif
  int noticed = 0, tried = 0;
  std::string first, which;
  for (const auto& s : harness::all_schedules()) {
    const std::string said = harness::outcome([&] {
      harness::apply(s);
      return work();
    });
    ++tried;
    if (said == "ok") continue;
    ++noticed;
    if (first.empty()) first = said.substr(0, said.find('\n')).substr(0, 110);
    which += " " + harness::name(s);
  }
  report(noticed > 0, name,
         std::to_string(noticed) + "/" + std::to_string(tried) + " schedules" +
             (noticed ? ", first: " + first : ""));
  if (verbose && noticed) printf("       %s\n", which.c_str());
}

void time_attention() {
  harness::apply({simt::Order::Fifo, simt::Async::Late, 1});
  Buffer<bf16> q(2 * 256 * 64), k(2 * 256 * 64), v(2 * 256 * 64), o(2 * 256 * 64);
  Buffer<float> lse(2 * 256);
  fill(q), fill(k), fill(v);
  const auto start = std::chrono::steady_clock::now();
  launch(attention<bf16, 64, false, 0>, dim3(4, 2), 128, attention_smem<64>, nullptr, q.get(),
         k.get(), v.get(), o.get(), lse.get(), 256, 256, 0.18f);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  printf("attention, 256 tokens, 2 heads of 64: %.3f s\n", took.count());
}

}  // namespace

int main(int argc, char** argv) {
  verbose = argc > 1 && std::string(argv[1]) == "-v";
  if (argc > 1 && std::string(argv[1]) == "--bench") {
    for (int i = 0; i < 5; ++i) time_attention();
    return 0;
  }
  must_pass("log_sum_exp", run_log_sum_exp<0>);
  must_pass("attention", [] { return run_attention<64, false, 0>(2, 70, 129); });
  must_pass("attention, causal", [] { return run_attention<64, true, 0>(1, 100, 77); });
  must_pass("attention, D 128", [] { return run_attention<128, false, 0>(1, 20, 70); });
  must_pass("gemm", [] { return run_gemm<false, 0>(100, 72, 328); });
  must_pass("gemm, B N-major", [] { return run_gemm<true, 0>(100, 72, 328); });
  must_pass("segment_stats", run_segment_stats<0>);
  must_pass("scale_tiles", run_scale_tiles<0>);

#define MUTANT(bug) must_notice("log_sum_exp: " #bug, run_log_sum_exp<lse_bug::bug>)
  MUTANT(no_barrier);
  MUTANT(writes_past_array);
  MUTANT(other_barrier);
  MUTANT(half_warp_shuffles);
  MUTANT(one_vector_too_many);
#undef MUTANT
#define MUTANT(bug)               \
  must_notice("attention: " #bug, \
              [] { return run_attention<64, false, attention_bug::bug>(1, 70, 200); })
  MUTANT(no_first_barrier);
  MUTANT(waits_too_little);
  MUTANT(tail_not_masked);
  MUTANT(no_second_barrier);
  MUTANT(stores_past_end);
#undef MUTANT
#define MUTANT(bug) \
  must_notice("gemm: " #bug, [] { return run_gemm<false, gemm_bug::bug>(64, 64, 384); })
  MUTANT(released_too_early);
  MUTANT(expects_half);
  MUTANT(wrong_stride);
  MUTANT(full_not_waited);
  MUTANT(wrong_first_parity);
  MUTANT(never_fenced);
  MUTANT(clears_unfenced);
  MUTANT(reads_before_wait);
  MUTANT(barrier_overwritten);
#undef MUTANT
#define MUTANT(kernel, bugs, bug, needs) \
  must_notice(#kernel ": " #bug, run_##kernel<bugs::bug>, needs)
  MUTANT(segment_stats, segment_bug, plain_addition, tsan_build);
  MUTANT(segment_stats, segment_bug, barrier_in_ragged_loop, any_build);
  MUTANT(segment_stats, segment_bug, no_last_barrier, any_build);
  MUTANT(scale_tiles, scale_bug, no_proxy_fence, any_build);
  MUTANT(scale_tiles, scale_bug, fenced_before_writing, tsan_build);
  MUTANT(scale_tiles, scale_bug, not_waited_before_reuse, any_build);
  MUTANT(scale_tiles, scale_bug, not_waited_at_end, any_build);
#undef MUTANT
  printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}

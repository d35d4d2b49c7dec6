// What this machine's cores can do at most, for the benchmarks' shares: f32 multiply-adds and,
// where there are such instructions, products of bf16 from registers; and reading, copying and
// updating memory beyond the caches. Each figure is the best of several rounds, since whatever
// disturbs a round only makes it slower.
//
//   ceilings THREADS  ->  {"fma":FLOP/s,"bf16":FLOP/s,"read":B/s,"copy":B/s,"update":B/s}
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float)), aligned(64), may_alias));

constexpr int64_t kBytes = int64_t{96} << 20;  // a thread's share of each buffer
constexpr int64_t kFloats = kBytes / 4;
constexpr int kRounds = 7;

// Twelve chains: more than latency times throughput of any core's FMA pipes, and few enough for
// sixteen registers.
constexpr int kChains = 12;
static float multiply_adds(int64_t steps, float m) {
  Vec a[kChains];
  Vec by = {}, plus = {};
  by += m;
  plus += 1e-9f;
  for (int i = 0; i < kChains; i++) a[i] = plus * static_cast<float>(i);
  for (int64_t s = 0; s < steps; s++)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; i++) a[i] = a[i] * by + plus;
  float sum = 0;
  for (int i = 0; i < kChains; i++)
    for (int l = 0; l < kLanes; l++) sum += a[i][l];
  return sum;
}

#ifdef __AVX512BF16__
constexpr int kBf16Flops = 64;  // 16 sums of two products each
static float bf16_products(int64_t steps, float m) {
  __m512 a[kChains];
  const __m512bh by = _mm512_cvtne2ps_pbh(_mm512_set1_ps(m), _mm512_set1_ps(m));
  for (int i = 0; i < kChains; i++) a[i] = _mm512_set1_ps(static_cast<float>(i));
  for (int64_t s = 0; s < steps; s++)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; i++) a[i] = _mm512_dpbf16_ps(a[i], by, by);
  float sum = 0;
  for (int i = 0; i < kChains; i++) sum += _mm512_reduce_add_ps(a[i]);
  return sum;
}
#endif

static float read_all(const float* x) {
  Vec sum[8] = {};
  for (int64_t i = 0; i < kFloats; i += 8 * kLanes)
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) sum[j] += *reinterpret_cast<const Vec*>(x + i + j * kLanes);
  float all = 0;
  for (int j = 0; j < 8; j++)
    for (int l = 0; l < kLanes; l++) all += sum[j][l];
  return all;
}

// Past the caches, where the instruction set has such a store: the target is not read first.
static void copy_all(const float* x, float* y) {
#if defined(__AVX512F__)
  for (int64_t i = 0; i < kFloats; i += 16) _mm512_stream_ps(y + i, _mm512_load_ps(x + i));
  _mm_sfence();
#elif defined(__AVX__)
  for (int64_t i = 0; i < kFloats; i += 8) _mm256_stream_ps(y + i, _mm256_load_ps(x + i));
  _mm_sfence();
#else
  memcpy(y, x, kBytes);
#endif
}

static void update_all(float* x, float factor) {
  for (int64_t i = 0; i < kFloats; i += kLanes) *reinterpret_cast<Vec*>(x + i) *= factor;
}

// Seconds from the common start to the last thread's end; the least of the rounds.
static double best(int threads, const std::function<void(int)>& work) {
  using Clock = std::chrono::steady_clock;
  double least = 1e30;
  for (int round = 0; round < kRounds; round++) {
    std::atomic<int> ready{0};
    std::atomic<bool> go{false};
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; t++)
      pool.emplace_back([&, t] {
        ready++;
        while (!go) std::this_thread::yield();
        work(t);
      });
    while (ready < threads) std::this_thread::yield();
    const auto start = Clock::now();
    go = true;
    for (auto& thread : pool) thread.join();
    least = std::min(least, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return least;
}

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::max(1, atoi(argv[1])) : 1;
  std::vector<float*> x(threads), y(threads);
  for (int t = 0; t < threads; t++) {
    x[t] = static_cast<float*>(aligned_alloc(1 << 21, kBytes));
    y[t] = static_cast<float*>(aligned_alloc(1 << 21, kBytes));
    if (!x[t] || !y[t]) return 1;
    std::fill_n(x[t], kFloats, 1.0f);
    std::fill_n(y[t], kFloats, 1.0f);
  }
  // Read at run time, so that nothing can be computed beforehand.
  const volatile float almost_one = 0.999999f;
  const float m = almost_one;
  std::vector<float> sink(threads);

  constexpr int64_t kSteps = 2'000'000;
  const double fma = best(threads, [&](int t) { sink[t] += multiply_adds(kSteps, m); });
#ifdef __AVX512BF16__
  const double bf16 = best(threads, [&](int t) { sink[t] += bf16_products(kSteps, m); });
#endif
  const double read = best(threads, [&](int t) { sink[t] += read_all(x[t]); });
  const double copy = best(threads, [&](int t) { copy_all(x[t], y[t]); });
  const double update = best(threads, [&](int t) { update_all(x[t], m); });

  volatile float used = 0;
  for (int t = 0; t < threads; t++) used = used + sink[t] + y[t][kFloats / 2];
  const double bytes = static_cast<double>(kBytes) * threads;
  printf("{\"fma\":%.0f,", 2.0 * kChains * kLanes * kSteps * threads / fma);
#ifdef __AVX512BF16__
  printf("\"bf16\":%.0f,", 1.0 * kChains * kBf16Flops * kSteps * threads / bf16);
#endif
  printf("\"read\":%.0f,\"copy\":%.0f,\"update\":%.0f}\n", bytes / read, 2 * bytes / copy,
         2 * bytes / update);
}

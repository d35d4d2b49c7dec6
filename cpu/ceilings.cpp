// Ceilings are measured as operations run: by a ThreadPool, so that its threads are where those of
// a device are, on huge pages, and with the widest instructions that the processor has. Each thread
// takes pieces of the buffers from a shared counter, as the pool's loops do, so that a thread which
// is disturbed does not hold the others up.
#include "ops/ceilings.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>

#include "cpu/host.h"
#include "cpu/simd/ceilings.h"
#include "cpu/simd/simd.h"
#include "cpu/threads.h"
#include "ops/error.h"

namespace p2r {

namespace cpu {

#if defined(__x86_64__)
namespace avx512 {
extern const CeilingLoops ceiling_loops;
}
namespace avx2 {
extern const CeilingLoops ceiling_loops;
}
#endif
#if defined(__aarch64__)
namespace neon {
extern const CeilingLoops ceiling_loops;
}
#else
namespace scalar {
extern const CeilingLoops ceiling_loops;
}
#endif

namespace {

const CeilingLoops& best_loops(const Simd& best) {
#if defined(__x86_64__)
  for (const CeilingLoops* loops : {&avx512::ceiling_loops, &avx2::ceiling_loops})
    if (std::strcmp(loops->name, best.name) == 0) return *loops;
#endif
  (void)best;
#if defined(__aarch64__)
  return neon::ceiling_loops;
#else
  return scalar::ceiling_loops;
#endif
}

struct Release {
  void operator()(float* block) const { host::release(block); }
};
using Buffer = std::unique_ptr<float, Release>;

// Written once, so that its pages are there.
Buffer buffer(ThreadPool& pool, int64_t pieces, int64_t piece) {
  const size_t bytes = static_cast<size_t>(pieces * piece) * sizeof(float);
  const size_t whole = (bytes + host::kHugePage - 1) / host::kHugePage * host::kHugePage;
  Buffer out(static_cast<float*>(host::allocate(host::kHugePage, whole)));
  if (!out) throw Error(Code::memory, "there is no memory for the ceilings");
  pool.parallel(pieces, 1, [&](int64_t begin, int64_t end, int) {
    std::fill(out.get() + begin * piece, out.get() + end * piece, 1.0f);
  });
  return out;
}

double seconds(const std::function<void()>& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace
}  // namespace cpu

Ceilings measure_ceilings(int threads, int64_t bytes, int rounds) {
  using namespace cpu;
  if (threads < 1 || bytes < 1 || rounds < 1)
    throw Error(Code::value, "ceilings need a thread, a byte and a round");
  int count = 0;
  const Simd& best = *simd_tables(&count)[0];
  const CeilingLoops& loops = best_loops(best);
  ThreadPool pool(threads);

  // Two buffers, in pieces of at most 256 KiB.
  constexpr int64_t kUnit = 128, kLargest = 65536;
  const int64_t floats = std::max<int64_t>(bytes / 8 / threads, kUnit);
  const int64_t piece = std::min(floats / kUnit * kUnit, kLargest);
  const int64_t pieces = std::max<int64_t>(floats / piece, 1) * threads;
  const Buffer x = buffer(pool, pieces, piece), y = buffer(pool, pieces, piece);
  // Small buffers are gone through often enough for a millisecond's worth of work.
  const int64_t passes = std::max<int64_t>(1, (int64_t{32} << 20) / (pieces * piece * 4));
  const bool nontemporal = passes == 1;

  // Read at run time, so that nothing can be computed beforehand.
  const volatile float almost_one = 0.999999f;
  const float factor = almost_one;
  volatile float used = 0;
  const auto rate = [&](double work, int64_t items, auto one) {
    double least = 1e30;
    for (int round = 0; round < rounds; ++round)
      least = std::min(least, seconds([&] {
                         pool.parallel(items, 1, [&](int64_t begin, int64_t end, int) {
                           for (int64_t i = begin; i < end; ++i) one(i);
                         });
                       }));
    return work / least;
  };
  // Each piece as often as there are passes, one after another, as a working set in the caches is.
  const auto over = [&](double arrays, auto one) {
    const double work = arrays * 4.0 * static_cast<double>(pieces * piece * passes);
    return rate(work, pieces * passes, [&](int64_t i) { one(i % pieces * piece); });
  };

  constexpr int64_t kSteps = 20'000, kTasks = 50;
  const double products = 12.0 * loops.lanes * kSteps * kTasks * threads;
  Ceilings out;
  out.fma = rate(2 * products, kTasks * threads,
                 [&](int64_t) { used = loops.multiply_adds(kSteps, factor); });
  if (loops.bf16_products && simd_features(best).bf16)
    out.bf16 = rate(4 * products, kTasks * threads,
                    [&](int64_t) { used = loops.bf16_products(kSteps, factor); });
  out.read = over(1, [&](int64_t at) { used = loops.read(x.get() + at, piece); });
  out.copy = over(2, [&](int64_t at) {
    (nontemporal ? loops.copy_nontemporal : loops.copy)(x.get() + at, y.get() + at, piece);
  });
  out.update = over(2, [&](int64_t at) { loops.update(x.get() + at, factor, piece); });
  return out;
}

}  // namespace p2r

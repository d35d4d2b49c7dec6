#include "cpu/device.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace p2r::cpu {

namespace {
// A worker that sleeps takes some ten microseconds to come back, longer than many small loops take.
constexpr int kSpins = 2000;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}
}  // namespace

Threads::Threads(int count) : count_(count) {
  for (int i = 1; i < count; ++i) workers_.emplace_back([this, i] { work(i); });
}

Threads::~Threads() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
    round_.fetch_add(1);
  }
  wake_.notify_all();
  for (std::thread& t : workers_) t.join();
}

void Threads::take_chunks(int thread) {
  for (;;) {
    const int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
    if (begin >= items_) return;
    (*body_)(begin, begin + grain_ < items_ ? begin + grain_ : items_, thread);
  }
}

void Threads::parallel(int64_t items, int64_t grain, const Body& f) {
  if (items <= 0) return;
  if (count_ == 1 || items <= grain) {
    for (int64_t begin = 0; begin < items; begin += grain)
      f(begin, begin + grain < items ? begin + grain : items, 0);
    return;
  }
  items_ = items;
  grain_ = grain;
  body_ = &f;
  next_.store(0, std::memory_order_relaxed);
  busy_.store(count_ - 1, std::memory_order_relaxed);
  {
    std::lock_guard lock(mutex_);
    round_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  take_chunks(0);
  while (busy_.load(std::memory_order_acquire)) relax();
}

void Threads::work(int thread) {
  uint64_t seen = 0;
  for (;;) {
    for (int i = 0; i < kSpins && round_.load(std::memory_order_acquire) == seen; ++i) relax();
    if (round_.load(std::memory_order_acquire) == seen) {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != seen; });
    }
    seen = round_.load(std::memory_order_acquire);
    if (stop_) return;
    take_chunks(thread);
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace p2r::cpu

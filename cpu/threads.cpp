#include "cpu/threads.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace p2r::cpu {

namespace {

constexpr uint64_t kLoop = uint64_t{1} << 32;  // one step of the gate's upper half

inline bool open(uint64_t gate) { return gate / kLoop % 2 == 1; }

}  // namespace

Threads::Threads(int count) : count_(count) {
  for (int i = 1; i < count; ++i) workers_.emplace_back([this, i] { work(i); });
}

Threads::~Threads() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& t : workers_) t.join();
}

void Threads::keep_off() {
#if defined(__linux__)
  const int here = sched_getcpu();
  if (here < 0 || here == kept_off_) return;
  kept_off_ = here;
  cpu_set_t others;
  if (sched_getaffinity(0, sizeof others, &others) != 0 || CPU_COUNT(&others) < count_) return;
  CPU_CLR(here, &others);
  for (std::thread& t : workers_) pthread_setaffinity_np(t.native_handle(), sizeof others, &others);
#endif
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
  keep_off();
  items_ = items;
  grain_ = grain;
  body_ = &f;
  next_.store(0, std::memory_order_relaxed);
  {
    std::lock_guard lock(mutex_);  // or a worker about to sleep would miss it
    gate_.fetch_add(kLoop, std::memory_order_release);
  }
  wake_.notify_all();
  take_chunks(0);
  gate_.fetch_add(kLoop, std::memory_order_acq_rel);  // closed: who has not joined stays out
  const auto left = [&] { return gate_.load(std::memory_order_acquire) % kLoop == 0; };
  while (!spin(left)) {
  }
}

void Threads::work(int thread) {
  uint64_t joined = 0;  // the loop last taken part in
  const auto nothing_new = [&](uint64_t gate) { return !open(gate) || gate / kLoop == joined; };
  for (;;) {
    const auto called = [&] {
      return stop_ || !nothing_new(gate_.load(std::memory_order_acquire));
    };
    if (!spin(called)) {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, called);
    }
    if (stop_) return;
    uint64_t gate = gate_.load(std::memory_order_acquire);
    while (!nothing_new(gate) &&
           !gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) {
    }
    if (nothing_new(gate)) continue;  // it closed first
    joined = gate / kLoop;
    take_chunks(thread);
    gate_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace p2r::cpu

#include "cpu/threads.h"

#include "ops/start_thread.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace p2r::cpu {

namespace {

constexpr uint64_t kEpoch = uint64_t{1} << 32;  // one epoch of the state

inline bool is_open(uint64_t state) { return state / kEpoch % 2 == 1; }

}  // namespace

ThreadPool::ThreadPool(int count) : count_(count) {
  try {
    for (int i = 1; i < count; ++i) workers_.push_back(start_thread([this, i] { work(i); }));
  } catch (...) {
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& t : workers_) t.join();
}

void ThreadPool::exclude_caller_cpu() {
#if defined(__linux__)
  const int here = sched_getcpu();
  if (here < 0 || here == excluded_cpu_) return;
  excluded_cpu_ = here;
  cpu_set_t others;
  if (sched_getaffinity(0, sizeof others, &others) != 0 || CPU_COUNT(&others) < count_) return;
  CPU_CLR(here, &others);
  for (std::thread& t : workers_) pthread_setaffinity_np(t.native_handle(), sizeof others, &others);
#endif
}

void ThreadPool::run_chunks(int thread) {
  for (;;) {
    const int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
    if (begin >= items_) return;
    (*body_)(begin, begin + grain_ < items_ ? begin + grain_ : items_, thread);
  }
}

void ThreadPool::parallel(int64_t items, int64_t grain, const Body& f) {
  if (items <= 0) return;
  if (count_ == 1 || items <= grain) {
    for (int64_t begin = 0; begin < items; begin += grain)
      f(begin, begin + grain < items ? begin + grain : items, 0);
    return;
  }
  exclude_caller_cpu();
  items_ = items;
  grain_ = grain;
  body_ = &f;
  next_.store(0, std::memory_order_relaxed);
  {
    std::lock_guard lock(mutex_);  // a worker about to block must not miss the notification
    state_.fetch_add(kEpoch, std::memory_order_release);
  }
  wake_.notify_all();
  run_chunks(0);
  state_.fetch_add(kEpoch, std::memory_order_acq_rel);  // closed to workers that have not joined
  const auto all_left = [&] { return state_.load(std::memory_order_acquire) % kEpoch == 0; };
  while (!spin_wait(all_left)) {
  }
}

void ThreadPool::work(int thread) {
  uint64_t joined = 0;  // the epoch of the last loop joined
  const auto can_join = [&](uint64_t state) { return is_open(state) && state / kEpoch != joined; };
  for (;;) {
    const auto ready = [&] { return stop_ || can_join(state_.load(std::memory_order_acquire)); };
    if (!spin_wait(ready)) {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, ready);
    }
    if (stop_) return;
    uint64_t state = state_.load(std::memory_order_acquire);
    while (can_join(state) &&
           !state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) {
    }
    if (!can_join(state)) continue;  // the loop closed first
    joined = state / kEpoch;
    run_chunks(thread);
    state_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace p2r::cpu

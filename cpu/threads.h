// The pool of workers that a CPU device's loops are split over.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace p2r::cpu {

// Waits for ready() as long as a sleeping thread may take to come back, which is longer than many
// small operations take; false if it has not come true by then. Whoever waits here gives way every
// microsecond or two: where threads outnumber CPUs, it may hold the one of the thread it waits for.
template <class Ready>
bool spin(const Ready& ready) {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::microseconds(50);
  do {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
    std::this_thread::yield();
  } while (Clock::now() < end);
  return ready();
}

// Workers that split one loop at a time. Items are handed out in chunks to whoever is free, so the
// result of an item must not depend on who computes it. Nobody waits for a worker that is still
// asleep: a loop is over when its items are done and those who joined it have left.
class Threads {
 public:
  explicit Threads(int count);
  ~Threads();
  int count() const { return count_; }
  // f(begin, end, thread) over chunks of `grain` items; returns when all are done.
  using Body = std::function<void(int64_t begin, int64_t end, int thread)>;
  void parallel(int64_t items, int64_t grain, const Body& f);

 private:
  void work(int thread);
  void take_chunks(int thread);
  // Keeps the workers off the CPU that the caller is on. A scheduler may wake one there, although
  // another CPU is idle, and it then waits for many milliseconds for the caller to be done.
  void keep_off();

  const int count_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  // Twice the number of loops begun, plus one while one is open to be joined: in the upper half;
  // the workers inside it: in the lower half.
  std::atomic<uint64_t> gate_{0};
  std::atomic<bool> stop_{false};
  int kept_off_ = -1;  // a CPU
  std::atomic<int64_t> next_{0};
  int64_t items_ = 0, grain_ = 1;
  const Body* body_ = nullptr;
};

}  // namespace p2r::cpu

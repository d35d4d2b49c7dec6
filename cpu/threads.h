// The thread pool of a CPU device: parallel loops with dynamic scheduling, and the bounded
// spin-wait that its threads use before they block.
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

// Spins until ready(), for as long as waking a blocked thread may take, which is longer than many
// small operations take; returns false on timeout. Yields every microsecond or two: where threads
// outnumber CPUs, the waiting thread may occupy the CPU of the thread that it waits for.
template <class Ready>
bool spin_wait(const Ready& ready) {
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

// Runs one parallel loop at a time on the caller and count - 1 workers. Threads claim chunks of
// items from a shared counter (dynamic scheduling), so an item's result must not depend on which
// thread computes it. Workers join a loop if they are awake before its items are exhausted:
// parallel() returns when all items are done and all workers that joined have left, and never waits
// for a worker that is still asleep.
class ThreadPool {
 public:
  explicit ThreadPool(int count);
  ~ThreadPool();
  int count() const { return count_; }
  // Calls f(begin, end, thread) for chunks of `grain` items; returns when all are done. `thread` is
  // below count(), and 0 for the caller.
  using Body = std::function<void(int64_t begin, int64_t end, int thread)>;
  void parallel(int64_t items, int64_t grain, const Body& f);

 private:
  void stop();  // and join the workers
  void work(int thread);
  void run_chunks(int thread);
  // Excludes the caller's CPU from the workers' affinity masks. The kernel may wake a worker there,
  // although another CPU is idle, where it is not scheduled for many milliseconds.
  void exclude_caller_cpu();

  const int count_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  // Upper 32 bits: an epoch, odd while a loop may be joined, advanced when a loop opens and when it
  // closes. Lower 32 bits: the number of workers inside the loop.
  std::atomic<uint64_t> state_{0};
  std::atomic<bool> stop_{false};
  int excluded_cpu_ = -1;
  std::atomic<int64_t> next_{0};  // the first unclaimed item
  int64_t items_ = 0, grain_ = 1;
  const Body* body_ = nullptr;
};

}  // namespace p2r::cpu

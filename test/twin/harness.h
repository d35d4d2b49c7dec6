// What the twin's own test programs share: guarded buffers, the schedules, runs in a child process.
#pragma once
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <string>
#include <vector>

#include "test/twin/simt.h"

namespace harness {

// Device memory with an inaccessible page behind it: one element too far faults in every build.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t n, T fill = T{}) : size_(n) {
    const size_t bytes = (n * sizeof(T) + 15) / 16 * 16, pages = (bytes + 4095) / 4096 * 4096;
    mapped_ = pages + 4096;
    base_ = static_cast<char*>(
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + pages, 4096, PROT_NONE)) std::abort();
    data_ = reinterpret_cast<T*>(base_ + pages - bytes);
    for (size_t i = 0; i < n; ++i) data_[i] = fill;
  }
  ~Buffer() { munmap(base_, mapped_); }
  Buffer(const Buffer&) = delete;
  T* get() { return data_; }
  T& operator[](size_t i) { return data_[i]; }
  size_t size() const { return size_; }

 private:
  size_t size_, mapped_;
  char* base_;
  T* data_;
};

// Integers and halves of small size: sums of their products are exact in float.
inline float small_value(uint32_t i) { return float(int(i * 2654435761u >> 20) % 15 - 7); }

struct Schedule {
  simt::Order order;
  simt::Async async;
  uint64_t seed;
};
inline std::string name(const Schedule& s) {
  static const char* orders[] = {"Fifo", "Reverse", "Lifo", "Random", "WarpPrio"};
  static const char* asyncs[] = {"Early", "Late", "Random"};
  return std::string(orders[int(s.order)]) + "/" + asyncs[int(s.async)];
}
// Every order with every async; TSan's slow processes take each order once.
inline std::vector<Schedule> all_schedules() {
  std::vector<Schedule> s;
  for (int order = 0; order < 5; ++order)
    for (int async = 0; async < 3; ++async)
#if SIMT_TSAN
      if (async == order % 3)
#endif
        s.push_back({simt::Order(order), simt::Async(async), uint64_t(order * 3 + async + 1)});
  return s;
}
inline void apply(const Schedule& s) {
  simt::options().order = s.order;
  simt::options().async = s.async;
  simt::options().seed = s.seed;
}

constexpr int sanitizer_exit = 99;

// Runs work in a child, so that crashes and sanitizer reports are outcomes like any other. Work
// returns whether its results were right. The answer is "ok" or what went wrong. The parent must
// not run kernels itself: TSan is blind in a child forked after the first fiber was made.
template <class F>
std::string outcome(F work) {
  int pipe_ends[2];
  if (pipe(pipe_ends)) return "no pipe";
  fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    close(pipe_ends[0]);
    std::string said = "ok";
    // TWIN_SHOW=1 lets the sanitizers' reports through.
    if (!getenv("TWIN_SHOW") && !freopen("/dev/null", "w", stderr)) _exit(1);
    try {
      if (!work()) said = "wrong value";
    } catch (const std::exception& e) {
      said = e.what();
    }
    if (write(pipe_ends[1], said.data(), said.size()) < 0) _exit(1);
    _exit(0);
  }
  close(pipe_ends[1]);
  std::string said;
  char part[512];
  for (ssize_t got; (got = read(pipe_ends[0], part, sizeof part)) > 0;)
    said.append(part, size_t(got));
  close(pipe_ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  if (WIFEXITED(status) && WEXITSTATUS(status) == sanitizer_exit) return "sanitizer report";
  if (WIFSIGNALED(status)) return std::string("signal ") + strsignal(WTERMSIG(status));
  if (WIFEXITED(status) && WEXITSTATUS(status))
    return "exit " + std::to_string(WEXITSTATUS(status));
  return said;
}

}  // namespace harness

// A report ends the child with a code of its own.
#define HARNESS_SANITIZER_OPTIONS                                                            \
  extern "C" const char* __asan_default_options() { return "exitcode=99:detect_leaks=0"; }   \
  extern "C" const char* __ubsan_default_options() { return "halt_on_error=1:exitcode=99"; } \
  extern "C" const char* __tsan_default_options() {                                          \
    return "halt_on_error=1:exitcode=99:report_signal_unsafe=0:atexit_sleep_ms=0";           \
  }

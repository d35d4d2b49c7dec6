// The CPU device's queue and pool under ThreadSanitizer: threads that each drive a device of their
// own, all at once, with every kind of work, results checked, and devices that end with work still
// queued. The kernels are left out: they are what the queue runs, and stand here as functions that
// do nothing.
//
//   g++ -std=c++20 -I. -fsanitize=thread test/native/queue.cpp cpu/device.cpp cpu/threads.cpp
//   cpu/host.cpp ops/*.cpp
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>

#include "cpu/device.h"

namespace p2r::cpu {

#define OP(family, function, Args) \
  void function(const Args&, Device&) {}
#include "ops/ops.def"
#undef OP

const Simd* const* simd_tables(int* count) {
  static const Simd none = [] {
    Simd table{};
    table.name = "none";
    return table;
  }();
  static const Simd* const tables[] = {&none};
  *count = 1;
  return tables;
}
SimdFeatures simd_features(const Simd&) { return {}; }

namespace {

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

// Every item once, whatever the sizes; the results are the caller's when parallel() returns.
void loops(std::mt19937& random, int rounds) {
  ThreadPool pool(1 + static_cast<int>(random() % 4));
  for (int round = 0; round < rounds; round++) {
    std::vector<int> seen(random() % 2'000);
    pool.parallel(seen.size(), 1 + random() % 50, [&](int64_t begin, int64_t end, int thread) {
      require(thread >= 0 && thread < pool.count(), "a thread that the pool has not");
      for (int64_t i = begin; i < end; i++) seen[i]++;
    });
    for (const int times : seen) require(times == 1, "an item that ran more than once, or never");
  }
}

// A chain on one buffer: each step reads what the one before wrote.
void chain(std::mt19937& random, int rounds) {
  constexpr int64_t kSize = 3'000;
  auto device =
      std::make_unique<CpuDevice>(OpenOptions{.threads = 1 + static_cast<int>(random() % 3)});
  auto* values = static_cast<int*>(device->allocate(kSize * sizeof(int)));
  std::vector<int> start(kSize, 0), result(kSize, -1);
  device->upload(values, start.data(), kSize * sizeof(int));
  int expected = 0;
  std::atomic<int> notified{0};
  int asked = 0;
  for (int round = 0; round < rounds; round++) {
    switch (random() % 6) {
      case 0:
        device->zero(values, kSize * sizeof(int));
        expected = 0;
        break;
      case 1: {  // temporary memory of a call, released while it is still used
        const Scratch scratch = device->scratch(kSize * sizeof(int));
        auto* copy = scratch.as<int>();
        device->copy(copy, values, kSize * sizeof(int));
        device->launch(kSize, 100, [=](int64_t begin, int64_t end, int) {
          for (int64_t i = begin; i < end; i++) values[i] = copy[i] + 2;
        });
        expected += 2;
        break;
      }
      case 2:
        device->host([values] { values[0]++, values[0]--; });
        break;
      case 3:
        device->notify([&notified](const std::string&) { notified++; });
        asked++;
        break;
      case 4: {
        std::vector<int> next(kSize, round);
        device->upload(values, next.data(), kSize * sizeof(int));
        expected = round;
        break;
      }
      default:
        device->launch(kSize, 64, [=](int64_t begin, int64_t end, int) {
          for (int64_t i = begin; i < end; i++) values[i]++;
        });
        expected++;
    }
    require(device->completed() <= device->queued(), "more work done than queued");
  }
  device->download(result.data(), values, kSize * sizeof(int));
  std::atomic<bool> done{false};
  device->notify([&done](const std::string& error) {
    require(error.empty(), "a device that was lost");
    done = true;
  });
  while (!done) std::this_thread::yield();
  for (const int value : result) require(value == expected, "a result of another order");
  require(notified == asked, "a completion that was not called");
  device->release(values);
}

// Ended with work queued, of which none may run later.
void endings(std::mt19937& random, int rounds) {
  for (int round = 0; round < rounds; round++) {
    auto counted = std::make_shared<std::atomic<int>>(0);
    {
      CpuDevice device(OpenOptions{.threads = 2});
      for (unsigned i = random() % 60; i > 0; i--)
        device.launch(40, 1,
                      [counted](int64_t begin, int64_t end, int) { *counted += end - begin; });
    }
    require(counted.use_count() == 1, "work that outlives its device");
  }
}

}  // namespace
}  // namespace p2r::cpu

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 100;
  const int seed = argc > 2 ? std::atoi(argv[2]) : 1;
  std::vector<std::thread> drivers;
  for (int i = 0; i < 4; i++)
    drivers.emplace_back([=] {
      std::mt19937 random(seed + i);
      for (int repeat = 0; repeat < 3; repeat++) {
        p2r::cpu::loops(random, rounds);
        p2r::cpu::chain(random, rounds);
        p2r::cpu::endings(random, rounds / 10);
      }
    });
  for (std::thread& driver : drivers) driver.join();
  std::printf("4 threads, %d rounds\n", rounds);
}

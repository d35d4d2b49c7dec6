// The CPU as a device: a FIFO queue of closures executed in order by one thread, like a stream, and
// a thread pool for the parallel loops inside them. An operation's function runs on the caller's
// thread; it captures its arguments by value and queues closures:
//
//   void gelu(const GeluArgs& a, Device& device) {
//     CpuDevice& cpu = cpu_device(device);
//     cpu.launch(a.x.size(), 4096, [a](int64_t begin, int64_t end, int thread) { ... });
//   }
//
// Memory for a closure is allocated before it is queued (Device::scratch), never inside it: the
// allocator is stream-ordered.
#pragma once
#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

#include "cpu/host.h"
#include "cpu/simd/simd.h"
#include "cpu/threads.h"
#include "ops/backend.h"

namespace p2r::cpu {

class CpuDevice final : public Device {
 public:
  explicit CpuDevice(const OpenOptions& options);
  ~CpuDevice() override;

  const DeviceInfo& info() const override { return info_; }
  const Kernels& kernels() const override;
  const Simd& simd() const { return *simd_; }
  const SimdFeatures& features() const { return features_; }
  int threads() const { return pool_.count(); }

  void submit(std::function<void()> work);
  // Queues f over chunks of `grain` items.
  void launch(int64_t items, int64_t grain, ThreadPool::Body f);
  // Inside queued work only.
  void parallel(int64_t items, int64_t grain, const ThreadPool::Body& f) {
    pool_.parallel(items, grain, f);
  }

  void upload(void* destination, const void* source, size_t bytes) override;
  void upload_from(void* destination, size_t bytes, std::function<const void*()> source) override;
  void download(void* destination, const void* source, size_t bytes) override;
  void copy(void* destination, const void* source, size_t bytes) override;
  void zero(void* destination, size_t bytes) override;
  void host(std::function<void()> f) override { submit(std::move(f)); }
  void notify(Completion done) override;
  // Shared memory is mapped files; under /dev/shm they exist in memory only.
  std::string share(void*& block, size_t bytes, const std::string& path) override;
  void* open_shared(const std::string& name, size_t bytes, bool any_file) override;
  void close_shared(void* block) override;
  void unshare(const std::string& name) override;
  std::shared_ptr<void> mark() override;
  double elapsed(const std::shared_ptr<void>& from, const std::shared_ptr<void>& to) override;
  std::shared_ptr<uint64_t> new_fault_word() override { return std::make_shared<uint64_t>(0); }
  void abort_by(const Abort& abort) override { abort_ = abort; }
  void abandon() override;
  void wait(uint64_t sequence) override;
  uint64_t completed() const override { return completed_.load(std::memory_order_acquire); }
  uint64_t queued() const override { return queued_; }

 protected:
  void* raw_allocate(size_t bytes) override;
  void raw_release(void* block) override;
  void drain() override;

 private:
  struct Work {
    std::function<void()> run;
    Abort abort;
  };
  void run();

  DeviceInfo info_;
  const Simd* simd_ = nullptr;
  SimdFeatures features_;
  ThreadPool pool_;
  std::mutex mutex_;
  std::condition_variable wake_, space_;
  std::deque<Work> queue_;
  Abort abort_;  // of the work that is queued next
  std::atomic<uint64_t> queued_{0}, completed_{0};
  std::atomic<bool> stop_{false};
  std::unordered_map<void*, size_t> mapped_;
  std::unordered_map<std::string, host::Shared> shared_;  // by name
  std::thread thread_;
};

inline CpuDevice& cpu_device(Device& device) { return static_cast<CpuDevice&>(device); }

}  // namespace p2r::cpu

// What a backend is: a device that owns memory and an in-order queue, and one function for each
// line of ops.def. An operation's function runs on the calling thread, takes scratch, puts work on
// the queue and returns; arguments were checked by binding/ before.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "ops/error.h"
#include "ops/memory.h"
#include "ops/tensor.h"

namespace p2r {

#define OP(family, function, Args) struct Args;
#include "ops/ops.def"
#undef OP

class Device;

// A backend's kernels: op name -> function. A line in ops.def without a kernel is a link error.
struct Kernels {
#define OP(family, function, Args) void (*function)(const Args&, Device&);
#include "ops/ops.def"
#undef OP
};

// A word that a kernel sets when it meets a value it must refuse (a target outside the
// vocabulary). Fallible arguments hold `int32_t* fault` as the last field.
struct Fault {
  std::string op, text;
  int32_t* flag = nullptr;
  const void* queue = nullptr;  // of the work that may set it,
  uint64_t sequence = 0;        // and that work's number on it
  std::shared_ptr<void> owner;
  bool raised() const { return *static_cast<volatile int32_t*>(flag) != 0; }
};

struct DeviceInfo {
  std::string backend, id, name;
  uint64_t memory_bytes = 0;
  int threads = 0;                    // CPU
  std::string simd;                   // CPU
  std::vector<std::string> features;  // CPU: what is used beyond the set
  std::string capability;             // CUDA, "9.0"
};

struct OpenOptions {
  int threads = 0;           // 0: from affinity and cgroup
  std::string simd;          // "": the best
  int bf16 = -1, vnni = -1;  // -1: what the CPU has
};

class Device : public Memory {
 public:
  virtual const DeviceInfo& info() const = 0;
  virtual const Kernels& kernels() const = 0;

  // `source` may be reused as soon as this returns.
  virtual void upload(void* destination, const void* source, size_t bytes) = 0;
  // Queues an upload of what `source` returns; it is called on a thread of the device and may wait.
  virtual void upload_from(void* destination, size_t bytes,
                           std::function<const void*()> source) = 0;
  // `destination` must live until the completion asked for next has been called.
  virtual void download(void* destination, const void* source, size_t bytes) = 0;
  virtual void copy(void* destination, const void* source, size_t bytes) = 0;
  virtual void zero(void* destination, size_t bytes) = 0;
  // Queues host code; everything queued later waits for it.
  virtual void host(std::function<void()> f) = 0;
  // Called once all work queued so far is done, on a thread of the device. `error` is empty, or why
  // the device was lost.
  using Completion = std::function<void(const std::string& error)>;
  virtual void notify(Completion done) = 0;

  // Memory that another process can open; Code::device where that cannot be.
  // Shares a block of `bytes` and returns what open_shared takes in the other process: CUDA's
  // handle of the block in hexadecimal digits, or the path, which the CPU fills. Where the block
  // cannot be shared as it lies it is replaced by one that can, and the caller gives the old one
  // back; what was queued before still uses that, in the order of the queue.
  virtual std::string share(void*& block, size_t bytes, const std::string& path);
  // At least `bytes` that another process shares.
  virtual void* open_shared(const std::string& name, size_t bytes);
  // Gives back what share put in a block's place or open_shared opened, when the queue is done with
  // it.
  virtual void close_shared(void* block);
  // No process opens it any more from now on; those that have it keep it.
  virtual void unshare(const std::string& name);

  // A point in the queue; the time between two points that have been passed, in milliseconds.
  virtual std::shared_ptr<void> mark() = 0;
  virtual double elapsed(const std::shared_ptr<void>& from, const std::shared_ptr<void>& to) = 0;

  virtual std::shared_ptr<Fault> new_fault(std::string op, std::string text) = 0;
  // Work queued up to this number is done / has been queued.
  virtual uint64_t completed() const = 0;
  virtual uint64_t queued() const = 0;

  Scratch scratch(size_t bytes) { return Scratch(*this, bytes); }
};

// The CPU.
DeviceInfo cpu_info();
std::unique_ptr<Device> open_cpu(const OpenOptions& options);

// CUDA, or its absence (cuda/none.cpp).
struct CudaStatus {
  bool built = false, available = false;
  std::string reason;
};
CudaStatus cuda_status();
std::vector<DeviceInfo> cuda_infos();
std::unique_ptr<Device> open_cuda(int index);

}  // namespace p2r

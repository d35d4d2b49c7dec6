// The interface of a backend: a device that owns memory and an in-order queue, and one function for
// each line of ops.def. An operation's function runs on the calling thread: it allocates scratch,
// enqueues work and returns. binding/ has checked the arguments before.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "ops/error.h"
#include "ops/fault.h"
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

// The fault of a call that may find an invalid value in a tensor (ops/fault.h), or of the calls of
// a composite. Arguments of such operations have a member `FaultFlag fault`, outside fields().
struct Fault {
  struct Part {
    std::shared_ptr<uint64_t> word;
    FaultSource source;
  };
  std::string op;
  std::vector<Part> parts;      // one for each call
  const void* queue = nullptr;  // of the work that may raise it
  uint64_t sequence = 0;        // that work's number on the queue
  bool reported = false;        // thrown by a wait, so that synchronize() need not

  static uint64_t read(const Part& part) {
    return *static_cast<volatile uint64_t*>(part.word.get());
  }
  bool raised() const {
    for (const Part& part : parts)
      if (read(part)) return true;
    return false;
  }
  // Of the first call that raised it.
  std::string text() const {
    for (const Part& part : parts)
      if (const uint64_t word = read(part)) return describe_fault(part.source, word);
    return "";
  }
};

struct DeviceInfo {
  std::string backend, id, name;
  uint64_t memory_bytes = 0;
  int threads = 0;                    // CPU
  std::string simd;                   // CPU
  std::vector<std::string> features;  // CPU: extensions in use beyond `simd`
  std::string capability;             // CUDA, "9.0"
};

struct OpenOptions {
  int threads = 0;           // 0: from affinity and cgroup
  std::string simd;          // "": the best
  int bf16 = -1, vnni = -1;  // -1: what the CPU has
  // Bytes of results whose work is queued and not done, at most: past it the caller waits for the
  // queue, or is refused. 0: half of the device's memory.
  double max_queued_bytes = 0;
  bool throw_when_full = false;
};

// By which queued work is withdrawn: work that has not begun when `requested` becomes true is left
// out, and raises a fault in `word`, so that nobody takes what it did not write for a result.
struct Abort {
  std::shared_ptr<std::atomic<bool>> requested;
  std::shared_ptr<uint64_t> word;
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
  // `destination` must live until the completion of the next notify() has been called.
  virtual void download(void* destination, const void* source, size_t bytes) = 0;
  virtual void copy(void* destination, const void* source, size_t bytes) = 0;
  virtual void zero(void* destination, size_t bytes) = 0;
  // Queues host code; everything queued later waits for it.
  virtual void host(std::function<void()> f) = 0;
  // Called once all work queued so far is done, on a thread of the device. `error` is empty, or why
  // the device was lost.
  using Completion = std::function<void(const std::string& error)>;
  virtual void notify(Completion done) = 0;

  // Memory shared with other processes; Code::device where the device has none.
  // Shares a block of `bytes` and returns the name for open_shared in the other process: CUDA's IPC
  // handle in hexadecimal digits, or on the CPU `path`, a new file, and where that is empty the
  // path of a descriptor of this process. A block that cannot be shared in place is replaced by a
  // copy that can, and the caller releases the old one, which work queued before may still use.
  virtual std::string share(void*& block, size_t bytes, const std::string& path);
  // Maps at least `bytes` that another process shares; with `any_file` any file of the CPU's host.
  virtual void* open_shared(const std::string& name, size_t bytes, bool any_file);
  // Unmaps what share put in a block's place or open_shared mapped, once the queue has finished
  // with it.
  virtual void close_shared(void* block);
  // No process can open it from now on; mappings that exist stay valid.
  virtual void unshare(const std::string& name);

  // Records an event in the queue; milliseconds between two events that have been reached.
  virtual std::shared_ptr<void> mark() = 0;
  virtual double elapsed(const std::shared_ptr<void>& from, const std::shared_ptr<void>& to) = 0;

  // Work queued from now on can be withdrawn by this, or by nothing. A device whose queue cannot be
  // changed computes it all.
  virtual void abort_by(const Abort&) {}
  // Leaves out all work that has not begun. For the end of whoever could see its results.
  virtual void abandon() {}
  // Blocks until work number `sequence` is done, or all.
  virtual void wait(uint64_t sequence) = 0;

  // A word of 0 that kernels can raise a fault in and the host can read.
  virtual std::shared_ptr<uint64_t> new_fault_word() = 0;
  // Sequence numbers of the last work that is done / that has been queued.
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

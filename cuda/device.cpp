// The CUDA device: one stream; memory from cudaMalloc, which the caching allocator of ops/memory.h
// reuses in stream order; pinned staging buffers for transfers; and a thread, the waiter, that
// waits for events and calls completions.
#include <algorithm>
#include <atomic>
#include <bit>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "cuda/stream.h"
#include "ops/start_thread.h"

namespace p2r::cuda {

namespace {

void check(cudaError_t e, const char* what) {
  if (e != cudaSuccess) throw Error(Code::cuda, std::string(what) + ": " + cudaGetErrorString(e));
}

// A pinned staging buffer of transfers, free for the next once `done` has passed and it is not
// held.
struct Staging {
  void* data = nullptr;
  cudaEvent_t done = nullptr;
  // By a download that the waiter still has to copy out.
  std::shared_ptr<std::atomic<bool>> held = std::make_shared<std::atomic<bool>>(false);

  bool free() const {
    if (*held) return false;
    const cudaError_t e = cudaEventQuery(done);
    // Not ready is an answer here; a later check of the last error must not find it.
    if (e != cudaSuccess) cudaGetLastError();
    return e == cudaSuccess;
  }
};

// Words of mapped host memory for kernels to raise faults in. Faults share it, since tensors that
// hold one may outlive the device.
class FaultWords {
 public:
  ~FaultWords() {
    for (uint64_t* block : blocks_) cudaFreeHost(block);
  }
  uint64_t* take() {
    if (free_.empty()) {
      constexpr int kWords = 2048;
      uint64_t* block = nullptr;
      check(cudaHostAlloc(reinterpret_cast<void**>(&block), kWords * sizeof(uint64_t),
                          cudaHostAllocMapped),
            "cudaHostAlloc");
      blocks_.push_back(block);
      for (int i = kWords; i-- > 0;) free_.push_back(block + i);
    }
    uint64_t* word = free_.back();
    free_.pop_back();
    *word = 0;
    return word;
  }
  void give_back(uint64_t* word) { free_.push_back(word); }

 private:
  std::vector<uint64_t*> blocks_, free_;
};

}  // namespace

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int index) : index_(index) {
    bind();
    cudaDeviceProp p;
    check(cudaGetDeviceProperties(&p, index), "cudaGetDeviceProperties");
    info_.backend = "cuda";
    info_.id = "cuda:" + std::to_string(index);
    info_.name = p.name;
    info_.memory_bytes = p.totalGlobalMem;
    info_.capability = std::to_string(p.major) + "." + std::to_string(p.minor);
    multiprocessors_ = p.multiProcessorCount;
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    try {
      waiter_ = start_thread([this] { wait_for_events(); });
    } catch (...) {
      cudaStreamDestroy(stream_);
      throw;
    }
  }

  ~CudaDevice() override {
    cudaSetDevice(index_);
    cudaStreamSynchronize(stream_);
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_one();
    waiter_.join();
    release_everything();
    for (void* block : opened_) cudaIpcCloseMemHandle(block);
    for (const auto& [capacity, buffers] : staging_)
      for (const Staging& s : buffers) {
        cudaFreeHost(s.data);
        cudaEventDestroy(s.done);
      }
    cudaStreamDestroy(stream_);
  }

  const DeviceInfo& info() const override { return info_; }
  const Kernels& kernels() const override;
  cudaStream_t stream() {
    bind();
    ++queued_;
    return stream_;
  }
  int multiprocessors() const { return multiprocessors_; }

  void upload(void* destination, const void* source, size_t bytes) override {
    if (!bytes) return;
    Staging& s = stage(bytes);
    std::memcpy(s.data, source, bytes);
    send(destination, s, bytes);
  }

  void upload_from(void* destination, size_t bytes, std::function<const void*()> source) override {
    if (!bytes) return;
    Staging& s = stage(bytes);
    host([data = s.data, bytes, source] { std::memcpy(data, source(), bytes); });
    send(destination, s, bytes);
  }

  void download(void* destination, const void* source, size_t bytes) override {
    if (!bytes) return;
    // The destination is JavaScript's and pageable, for which cudaMemcpyAsync would block here
    // until the stream gets there. So it copies to pinned memory, and the waiter from there.
    Staging& s = stage(bytes);
    check(cudaMemcpyAsync(s.data, source, bytes, cudaMemcpyDeviceToHost, stream()), "copy to host");
    check(cudaEventRecord(s.done, stream_), "cudaEventRecord");
    // Not a host function of the stream: all streams share the thread that runs those, and another
    // device's may be waiting there for this copy.
    *s.held = true;
    notify([destination, data = s.data, bytes, held = s.held](const std::string& error) {
      if (error.empty()) std::memcpy(destination, data, bytes);
      *held = false;
    });
  }

  void copy(void* destination, const void* source, size_t bytes) override {
    if (!bytes) return;
    check(cudaMemcpyAsync(destination, source, bytes, cudaMemcpyDeviceToDevice, stream()), "copy");
  }
  void zero(void* destination, size_t bytes) override {
    if (!bytes) return;
    check(cudaMemsetAsync(destination, 0, bytes, stream()), "memset");
  }

  void host(std::function<void()> f) override {
    auto* owned = new std::function<void()>(std::move(f));
    check(cudaLaunchHostFunc(
              stream(),
              [](void* p) {
                std::unique_ptr<std::function<void()>> f(static_cast<std::function<void()>*>(p));
                (*f)();
              },
              owned),
          "cudaLaunchHostFunc");
  }

  void notify(Completion done) override {
    cudaEvent_t event = new_event(cudaEventDisableTiming | cudaEventBlockingSync);
    check(cudaEventRecord(event, stream()), "cudaEventRecord");
    {
      std::lock_guard lock(mutex_);
      waiting_.push_back({event, queued_, std::move(done)});
    }
    wake_.notify_one();
  }

  std::string share(void*& block, size_t, const std::string&) override {
    bind();
    cudaIpcMemHandle_t handle;
    const cudaError_t e = cudaIpcGetMemHandle(&handle, block);
    if (e != cudaSuccess) {
      cudaGetLastError();  // not sticky
      throw Error(Code::device,
                  std::string("CUDA cannot share this memory with other processes: ") +
                      cudaGetErrorString(e));
    }
    std::string name;
    for (const char byte : handle.reserved)
      for (const int nibble : {(byte >> 4) & 15, byte & 15}) name += "0123456789abcdef"[nibble];
    return name;
  }

  void* open_shared(const std::string& name, size_t, bool) override {
    bind();
    cudaIpcMemHandle_t handle;
    if (name.size() != 2 * sizeof handle.reserved ||
        name.find_first_not_of("0123456789abcdef") != std::string::npos)
      throw Error(Code::value, "a handle of CUDA memory has 128 hexadecimal digits");
    for (size_t i = 0; i < sizeof handle.reserved; ++i)
      handle.reserved[i] = static_cast<char>(std::stoi(name.substr(2 * i, 2), nullptr, 16));
    void* block = nullptr;
    const cudaError_t e = cudaIpcOpenMemHandle(&block, handle, cudaIpcMemLazyEnablePeerAccess);
    if (e != cudaSuccess) {
      cudaGetLastError();
      throw Error(Code::device, std::string("CUDA cannot open this memory of another process: ") +
                                    cudaGetErrorString(e));
    }
    opened_.insert(block);
    return block;
  }

  void close_shared(void* block) override {
    opened_.erase(opened_.find(block));
    notify([index = index_, block](const std::string&) {
      cudaSetDevice(index);
      cudaIpcCloseMemHandle(block);
    });
  }

  void unshare(const std::string&) override {}

  std::shared_ptr<void> mark() override {
    cudaEvent_t event = new_event(cudaEventDefault);
    check(cudaEventRecord(event, stream()), "cudaEventRecord");
    return {event, [](void* e) { cudaEventDestroy(static_cast<cudaEvent_t>(e)); }};
  }

  double elapsed(const std::shared_ptr<void>& from, const std::shared_ptr<void>& to) override {
    float ms = 0;
    check(cudaEventElapsedTime(&ms, static_cast<cudaEvent_t>(from.get()),
                               static_cast<cudaEvent_t>(to.get())),
          "cudaEventElapsedTime");
    return ms;
  }

  std::shared_ptr<uint64_t> new_fault_word() override {
    bind();
    return {words_->take(), [words = words_](uint64_t* w) { words->give_back(w); }};
  }

  void wait(uint64_t) override { drain(); }
  uint64_t completed() const override { return completed_.load(std::memory_order_acquire); }
  uint64_t queued() const override { return queued_; }

 protected:
  void* raw_allocate(size_t bytes) override {
    bind();
    void* p = nullptr;
    if (cudaMalloc(&p, bytes) != cudaSuccess) {
      cudaGetLastError();  // out of memory is not sticky
      return nullptr;
    }
    return p;
  }
  void raw_release(void* block) override {
    bind();
    cudaFree(block);
  }
  void drain() override {
    bind();
    check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
    completed_.store(queued_, std::memory_order_release);
  }

 private:
  struct Waiting {
    cudaEvent_t event;
    uint64_t sequence;
    Completion done;
  };

  void bind() const { cudaSetDevice(index_); }

  static cudaEvent_t new_event(unsigned flags) {
    cudaEvent_t event;
    check(cudaEventCreateWithFlags(&event, flags), "cudaEventCreate");
    return event;
  }

  // A buffer whose size is a power of two. The stream finishes transfers in order, so only the
  // buffer of this size that was used longest ago is asked about, however many are in flight.
  Staging& stage(size_t bytes) {
    bind();
    const size_t capacity = std::bit_ceil(std::max(bytes, kSmallestStaging));
    std::deque<Staging>& buffers = staging_[capacity];
    if (!buffers.empty() && buffers.front().free()) {
      buffers.push_back(std::move(buffers.front()));
      buffers.pop_front();
      return buffers.back();
    }
    Staging s;
    check(cudaHostAlloc(&s.data, capacity, cudaHostAllocDefault), "cudaHostAlloc");
    s.done = new_event(cudaEventDisableTiming);
    buffers.push_back(std::move(s));
    return buffers.back();
  }

  void send(void* destination, Staging& s, size_t bytes) {
    check(cudaMemcpyAsync(destination, s.data, bytes, cudaMemcpyHostToDevice, stream()),
          "copy to device");
    check(cudaEventRecord(s.done, stream_), "cudaEventRecord");
  }

  void wait_for_events() {
    cudaSetDevice(index_);
    for (;;) {
      Waiting w;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return stop_ || !waiting_.empty(); });
        if (waiting_.empty()) return;
        w = std::move(waiting_.front());
        waiting_.pop_front();
      }
      const cudaError_t e = cudaEventSynchronize(w.event);
      cudaEventDestroy(w.event);
      uint64_t before = completed_.load();
      while (before < w.sequence && !completed_.compare_exchange_weak(before, w.sequence)) {
      }
      w.done(e == cudaSuccess ? ""
                              : std::string("the CUDA device was lost: ") + cudaGetErrorString(e));
    }
  }

  const int index_;
  DeviceInfo info_;
  int multiprocessors_ = 0;
  cudaStream_t stream_ = nullptr;
  std::shared_ptr<FaultWords> words_ = std::make_shared<FaultWords>();
  static constexpr size_t kSmallestStaging = 4096;
  std::map<size_t, std::deque<Staging>> staging_;  // by size, the one used longest ago first
  std::multiset<void*> opened_;  // the runtime counts how often a handle is opened
  uint64_t queued_ = 0;
  std::atomic<uint64_t> completed_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Waiting> waiting_;
  bool stop_ = false;
  std::thread waiter_;
};

#define OP(family, function, Args) void function(const Args&, Device&);
#include "ops/ops.def"
#undef OP

const Kernels& CudaDevice::kernels() const {
  static const Kernels table = {
#define OP(family, function, Args) &function,
#include "ops/ops.def"
#undef OP
  };
  return table;
}

cudaStream_t stream_of(Device& device) { return static_cast<CudaDevice&>(device).stream(); }
int multiprocessors(Device& device) { return static_cast<CudaDevice&>(device).multiprocessors(); }

}  // namespace p2r::cuda

namespace p2r {

// Asking never fails and never keeps the addon from loading: the runtime is part of it, and looks
// for the driver when it is first called.
CudaStatus cuda_status() {
  const auto dotted = [](int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  };
  int runtime = 0, driver = 0, count = 0;
  cudaRuntimeGetVersion(&runtime);
  const std::string built = "CUDA " + dotted(runtime) + " is built in";
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    cudaGetLastError();
    return {true, false, built + ", but no NVIDIA driver was found."};
  }
  const std::string found = "the NVIDIA driver is for CUDA " + dotted(driver);
  const cudaError_t e = cudaGetDeviceCount(&count);
  cudaGetLastError();
  if (e == cudaErrorInsufficientDriver)
    return {true, false, built + ", but " + found + ", which is too old."};
  if (e != cudaSuccess || count == 0)
    return {true, false,
            built + " and " + found + ", but there is no CUDA device" +
                (e == cudaSuccess || e == cudaErrorNoDevice
                     ? "."
                     : std::string(": ") + cudaGetErrorString(e) + ".")};
  return {true, true, std::to_string(count) + " CUDA device" + (count == 1 ? "" : "s") + " found."};
}

std::vector<DeviceInfo> cuda_infos() {
  std::vector<DeviceInfo> out;
  if (!cuda_status().available) return out;
  int count = 0;
  cudaGetDeviceCount(&count);
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp p;
    if (cudaGetDeviceProperties(&p, i) != cudaSuccess) continue;
    DeviceInfo info;
    info.backend = "cuda";
    info.id = "cuda:" + std::to_string(i);
    info.name = p.name;
    info.memory_bytes = p.totalGlobalMem;
    info.capability = std::to_string(p.major) + "." + std::to_string(p.minor);
    out.push_back(info);
  }
  return out;
}

std::unique_ptr<Device> open_cuda(int index) { return std::make_unique<cuda::CudaDevice>(index); }

}  // namespace p2r

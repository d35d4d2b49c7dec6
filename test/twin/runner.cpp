// Runs recorded cases (replay.h) through the CUDA backend's own source on the kernel twin.
//
//   runner [--order fifo|reverse|lifo|random|warp] [--async early|late|random] [--seed N]
//          [--jobs N] [--kernels] CASE|FOLDER...
//
// Kernels are identified by offsets from the symbol runner_origin.
#include "cuda/launch.cuh"
#include "test/twin/replay.h"

extern "C" void runner_origin() {}

namespace p2r {

namespace cuda {
#define OP(family, function, Args) void function(const Args&, Device&);
#include "ops/ops.def"
#undef OP

cudaStream_t stream_of(Device&) { return nullptr; }
int multiprocessors(Device&) { return 2; }  // few, so that persistent kernels take several tiles
}  // namespace cuda

namespace {

// Hopper runs every kernel that a caller can choose, those of older chips included.
constexpr const char *kHopper = "9.0", *kAnother = "8.0";

// Host memory of exactly the requested size, so that AddressSanitizer detects accesses past its
// end.
class TwinDevice final : public Device, public replay::Stage {
 public:
  explicit TwinDevice(const char* capability) {
    info_.backend = "cuda";
    info_.capability = capability;
  }
  ~TwinDevice() override {
    for (const auto& [block, bytes] : blocks_) std::free(block);
  }
  Device& device() override { return *this; }
  void* tensor(size_t bytes) override { return allocate(bytes); }
  void* allocate(size_t bytes) override {
    void* block = nullptr;
    if (posix_memalign(&block, 256, bytes ? bytes : 1)) throw Error(Code::memory, "out of memory");
    std::memset(block, 0xFF, bytes);
    blocks_[block] = bytes;
    adopt(bytes);
    return block;
  }
  // Freed with the device: a released block must still be readable.
  void release(void* block) override { disown(blocks_.at(block)); }
  const DeviceInfo& info() const override {
    asked_ = true;
    return info_;
  }
  bool asked() const { return asked_; }
  const Kernels& kernels() const override {
    static const Kernels table = {
#define OP(family, function, Args) &cuda::function,
#include "ops/ops.def"
#undef OP
    };
    return table;
  }
  void upload(void* d, const void* s, size_t n) override { std::memcpy(d, s, n); }
  void upload_from(void* d, size_t n, std::function<const void*()> s) override {
    std::memcpy(d, s(), n);
  }
  void download(void* d, const void* s, size_t n) override { std::memcpy(d, s, n); }
  void copy(void* d, const void* s, size_t n) override { std::memcpy(d, s, n); }
  void zero(void* d, size_t n) override { std::memset(d, 0, n); }
  void host(std::function<void()> f) override { f(); }
  void notify(Completion done) override { done(""); }
  std::shared_ptr<void> mark() override { return nullptr; }
  double elapsed(const std::shared_ptr<void>&, const std::shared_ptr<void>&) override { return 0; }
  std::shared_ptr<Fault> new_fault(std::string, std::string) override {
    auto fault = std::make_shared<Fault>();
    auto flag = std::make_shared<int32_t>(0);
    fault->flag = flag.get();
    fault->owner = flag;
    return fault;
  }
  uint64_t completed() const override { return 0; }
  uint64_t queued() const override { return 0; }

 protected:
  void* raw_allocate(size_t) override { return nullptr; }
  void raw_release(void*) override {}
  void drain() override {}

 private:
  DeviceInfo info_;
  mutable bool asked_ = false;
  std::map<void*, size_t> blocks_;
};

class Twin final : public replay::Place {
 public:
  std::unique_ptr<replay::Stage> open() override { return std::make_unique<TwinDevice>(kHopper); }
  std::unique_ptr<replay::Stage> open_another(replay::Stage& first) override {
    if (!static_cast<TwinDevice&>(first).asked()) return nullptr;
    return std::make_unique<TwinDevice>(kAnother);
  }
  std::vector<long long> launched() override {
    std::vector<long long> out;
    for (const void* kernel : simt::stats().kernels)
      out.push_back(static_cast<const char*>(kernel) -
                    reinterpret_cast<const char*>(&runner_origin));
    simt::stats().kernels.clear();
    return out;
  }
  bool option(const std::string& name, const std::string& value) override {
    using simt::Async;
    using simt::Order;
    static const std::map<std::string, Order> orders = {{"fifo", Order::Fifo},
                                                        {"reverse", Order::Reverse},
                                                        {"lifo", Order::Lifo},
                                                        {"random", Order::Random},
                                                        {"warp", Order::WarpPrio}};
    static const std::map<std::string, Async> asyncs = {
        {"early", Async::Early}, {"late", Async::Late}, {"random", Async::Random}};
    if (name == "--order")
      simt::options().order = orders.at(value);
    else if (name == "--async")
      simt::options().async = asyncs.at(value);
    else if (name == "--seed")
      simt::options().seed = std::strtoull(value.c_str(), nullptr, 10);
    else
      return false;
    return true;
  }
};

}  // namespace
}  // namespace p2r

int main(int argc, char** argv) {
  p2r::Twin twin;
  return p2r::replay::run_program(argc, argv, twin);
}

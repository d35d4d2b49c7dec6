// Runs recorded cases (replay.h) through the CUDA backend's own source on the kernel twin.
//
//   runner [--order fifo|reverse|lifo|random|warp] [--async early|late|random] [--seed N]
//          [--jobs N] [--kernels] [--shift] CASE|FOLDER...
//
// Kernels are identified by offsets from the symbol runner_origin. With them, --kernels prints each
// kind of shared-memory operand of their wgmmas:
// operand A|B K|MN <bytes of the swizzle> <leading offset> <stride> <rows>.
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

// Hopper has every kernel that a caller can choose, and the kernels of all other chips. Of those,
// the second one's blocks have the least shared memory.
struct Chip {
  const char* capability;
  size_t shared_limit;
};
constexpr Chip kHopper = {"9.0", 227 * 1024}, kAnother = {"8.6", 99 * 1024};

// Host memory of exactly the requested size, so that AddressSanitizer detects accesses past its
// end.
class TwinDevice final : public Device, public replay::Stage {
 public:
  explicit TwinDevice(const Chip& chip) {
    info_.backend = "cuda";
    info_.capability = chip.capability;
    simt::options().shared_limit = chip.shared_limit;
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
  void wait(uint64_t) override {}
  std::shared_ptr<void> mark() override { return nullptr; }
  double elapsed(const std::shared_ptr<void>&, const std::shared_ptr<void>&) override { return 0; }
  std::shared_ptr<uint64_t> new_fault_word() override { return std::make_shared<uint64_t>(0); }
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
  Twin() {
    simt::options().on_wgmma = [this](const simt::Wgmma& op, bool a_in_registers, int) {
      if (!a_in_registers) operands_.insert({'A', op.a_mn_major, op.a_desc >> 14, 64});
      operands_.insert({'B', op.b_mn_major, op.b_desc >> 14, op.n});
    };
  }
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
  std::string told() override {
    std::string lines;
    for (const auto& [operand, mn_major, desc, rows] : operands_) {
      static const int swizzles[] = {0, 128, 64, 32};
      lines += std::string("operand ") + operand + (mn_major ? " MN " : " K ") +
               std::to_string(swizzles[desc >> 48]) + " " +
               std::to_string((desc >> 2 & 0x3FFF) * 16) + " " +
               std::to_string((desc >> 18 & 0x3FFF) * 16) + " " + std::to_string(rows) + "\n";
    }
    operands_.clear();
    return lines;
  }
  std::string broken() override {
    const bool waited = simt::stats().synchronisations > 0;
    simt::stats().synchronisations = 0;
    return waited ? "the operation waits for the device or reads from it" : "";
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

 private:
  // A or B, whether it is MN-major, its descriptor without the start, and its rows.
  std::set<std::tuple<char, bool, uint64_t, int>> operands_;
};

}  // namespace
}  // namespace p2r

int main(int argc, char** argv) {
  p2r::Twin twin;
  return p2r::replay::run_program(argc, argv, twin);
}

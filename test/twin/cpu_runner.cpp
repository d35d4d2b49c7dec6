// Runs recorded cases (replay.h) on the CPU backend, outside Node: on a CPU that is emulated.
#include <new>

#include "test/twin/replay.h"

namespace p2r {

namespace {

class CpuStage final : public replay::Stage {
 public:
  CpuStage() : device_(open_cpu({.threads = 2})) {}
  ~CpuStage() override {
    device_.reset();
    for (void* block : blocks_) ::operator delete(block, kAlignment);
  }
  Device& device() override { return *device_; }
  void* tensor(size_t bytes) override {
    blocks_.push_back(::operator new(bytes ? bytes : 1, kAlignment));
    std::memset(blocks_.back(), 0xFF, bytes);
    return blocks_.back();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  std::unique_ptr<Device> device_;
  std::vector<void*> blocks_;
};

class Cpu final : public replay::Place {
 public:
  std::unique_ptr<replay::Stage> open() override { return std::make_unique<CpuStage>(); }
  std::vector<long long> launched() override { return {}; }
  bool option(const std::string&, const std::string&) override { return false; }
};

}  // namespace
}  // namespace p2r

int main(int argc, char** argv) {
  p2r::Cpu cpu;
  return p2r::replay::run_program(argc, argv, cpu);
}

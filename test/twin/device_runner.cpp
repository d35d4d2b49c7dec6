// Runs recorded cases (replay.h) on the first GPU, outside Node, so that compute-sanitizer sees
// kernels and nothing else. Kernels are identified by numbers in the order of their first launch.
#include <cuda_runtime.h>

#include "test/twin/replay.h"

namespace {

// Launches are intercepted by the linker's --wrap and recorded.
std::map<cudaKernel_t, long long> numbers;
std::vector<long long> seen;

}  // namespace

extern "C" cudaError_t __real___cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t,
                                                 cudaStream_t);
extern "C" cudaError_t __wrap___cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block,
                                                 void** args, size_t shared, cudaStream_t stream) {
  const long long number =
      numbers.emplace(kernel, static_cast<long long>(numbers.size())).first->second;
  if (std::find(seen.begin(), seen.end(), number) == seen.end()) seen.push_back(number);
  return __real___cudaLaunchKernel(kernel, grid, block, args, shared, stream);
}

namespace p2r {

namespace {

void check(cudaError_t e) {
  if (e != cudaSuccess) throw Error(Code::cuda, cudaGetErrorString(e));
}

// Each tensor is an allocation of exactly its size, so that memcheck detects an access one byte
// past its end; the pool would round it up.
class GpuStage final : public replay::Stage {
 public:
  explicit GpuStage(Device& device) : device_(device) {}
  ~GpuStage() override {
    for (void* block : blocks_) cudaFree(block);
  }
  Device& device() override { return device_; }
  void* tensor(size_t bytes) override {
    void* block = nullptr;
    check(cudaMalloc(&block, bytes ? bytes : 1));
    blocks_.push_back(block);
    check(cudaMemset(block, 0xFF, bytes));
    check(cudaDeviceSynchronize());  // the device's own stream does not wait for this one
    return block;
  }

 private:
  Device& device_;
  std::vector<void*> blocks_;
};

class Gpu final : public replay::Place {
 public:
  std::unique_ptr<replay::Stage> open() override {
    // Only now: a process that forks must not have used the GPU before.
    if (!device_) device_ = open_cuda(0);
    return std::make_unique<GpuStage>(*device_);
  }
  std::vector<long long> launched() override { return std::exchange(seen, {}); }
  bool option(const std::string&, const std::string&) override { return false; }

 private:
  std::unique_ptr<Device> device_;
};

}  // namespace
}  // namespace p2r

int main(int argc, char** argv) {
  p2r::Gpu gpu;
  return p2r::replay::run_program(argc, argv, gpu);
}

// Runs recorded cases (ops/fields.h) through the CUDA backend's own source on the kernel twin and
// compares with what the CPU backend gave.
//
//   runner [--order fifo|reverse|lifo|random|warp] [--async early|late|random] [--seed N]
//          [--jobs N] [--kernels] CASE|FOLDER...
//
// --jobs N shares the cases among N processes. --kernels prints for each case the kernels that it
// launched, as offsets from the symbol runner_origin.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda/kernel.cuh"
#include "operations.h"  // made by CMake: every header of ops/
#include "ops/fields.h"
#include "ops/half.h"
#include "ops/kernels.h"

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

// Hopper has every kernel that a caller can choose; those that it shares with other chips run there
// too.
constexpr const char *kHopper = "9.0", *kAnother = "8.0";

// Host memory of exactly the size asked for, so that AddressSanitizer sees each byte too many.
class TwinDevice final : public Device {
 public:
  explicit TwinDevice(const char* capability) {
    info_.backend = "cuda";
    info_.capability = capability;
  }
  ~TwinDevice() override {
    for (void* block : blocks_) std::free(block);
  }
  void* allocate(size_t bytes) override {
    void* block = nullptr;
    if (posix_memalign(&block, 256, bytes ? bytes : 1)) throw Error(Code::memory, "out of memory");
    std::memset(block, 0xFF, bytes);
    blocks_.push_back(block);
    return block;
  }
  void release(void*) override {}  // with the device: a released block must still be readable
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
  std::shared_ptr<Fault> new_fault(std::string, std::string) override { return nullptr; }
  uint64_t completed() const override { return 0; }
  uint64_t queued() const override { return 0; }

 protected:
  void* raw_allocate(size_t) override { return nullptr; }
  void raw_release(void*) override {}
  void drain() override {}

 private:
  DeviceInfo info_;
  mutable bool asked_ = false;
  std::vector<void*> blocks_;
};

double entry(const std::vector<char>& bytes, DType dtype, size_t i) {
  if (dtype == DType::u8) return static_cast<unsigned char>(bytes[i]);
  if (dtype == DType::i32) {
    int32_t v;
    std::memcpy(&v, &bytes[i * 4], 4);
    return v;
  }
  if (dtype == DType::f32) {
    float v;
    std::memcpy(&v, &bytes[i * 4], 4);
    return v;
  }
  uint16_t h;
  std::memcpy(&h, &bytes[i * 2], 2);
  return dtype == DType::bf16 ? f32_of_bf16(h) : f32_of_f16(h);
}

// Why the tensor is not what was expected, or nothing.
std::string difference(const Field& f, const Bound& bound) {
  const size_t n = static_cast<size_t>(f.view.size());
  std::vector<char> bytes(f.after.size());
  std::memcpy(bytes.data(), f.view.data, bytes.size());
  double largest = 0;
  for (size_t i = 0; i < n; ++i)
    if (const double e = std::fabs(entry(f.after, f.view.dtype, i)); std::isfinite(e))
      largest = std::max(largest, e);
  for (size_t i = 0; i < n; ++i) {
    const double a = entry(bytes, f.view.dtype, i), e = entry(f.after, f.view.dtype, i);
    if (a == e || (std::isnan(a) && std::isnan(e))) continue;
    const double allowed =
        2 * (bound.absolute + bound.relative * std::fabs(e) + bound.of_largest * largest);
    if (std::fabs(a - e) <= allowed) continue;
    return "[" + std::to_string(i) + "] of " + std::to_string(n) + " is " + std::to_string(a) +
           ", expected " + std::to_string(e) + " within " + std::to_string(allowed);
  }
  return "";
}

template <class Args>
std::string run_once(Case& c, void (*Kernels::*function)(const Args&, Device&), int64_t kernel,
                     TwinDevice& device) {
  std::map<uint64_t, void*> placed;
  for (Field& f : c.fields) {
    if (!f.view) continue;
    void*& data = placed[f.address];
    if (!data) data = device.allocate(f.view.bytes());
    f.view.data = data;
    if (!f.before.empty()) std::memcpy(data, f.before.data(), f.before.size());
  }
  Args args;
  restore(args, c.fields);
  if constexpr (requires { args.kernel; }) args.kernel = kernel;
  int32_t fault = 0;
  if constexpr (requires { args.fault; }) args.fault = &fault;
  (device.kernels().*function)(args, device);
  if ((fault != 0) != c.fault) return c.fault ? "raised no fault" : "raised a fault";
  for (size_t i = 0; i < c.fields.size(); ++i)
    if (!c.fields[i].after.empty())
      if (std::string d = difference(c.fields[i], c.bound); !d.empty())
        return "field " + std::to_string(i) + " " + d;
  return "";
}

// An operation with a choice of kernels is run by each that takes the case, whichever was recorded;
// one that chooses by the chip itself, on two.
template <class Args>
std::string run(Case& c, void (*Kernels::*function)(const Args&, Device&),
                [[maybe_unused]] const std::string& family) {
  if constexpr (requires(Args args) { args.kernel; }) {
    Args args;
    restore(args, c.fields);
    const View& x = args.qkv ? args.qkv : args.q;
    const std::vector<KernelChoice> choices = kernel_choices(family, TwinDevice(kHopper).info());
    for (size_t i = 0; i < choices.size(); ++i) {
      if (!choices[i].takes(x.dtype, x.shape[-1])) continue;
      TwinDevice device(kHopper);
      if (std::string d = run_once(c, function, static_cast<int64_t>(i), device); !d.empty())
        return std::string("kernel ") + choices[i].name + ": " + d;
    }
    return "";
  } else {
    TwinDevice device(kHopper), another(kAnother);
    if (std::string d = run_once(c, function, 0, device); !d.empty() || !device.asked()) return d;
    const std::string d = run_once(c, function, 0, another);
    return d.empty() ? d : std::string("on chip ") + kAnother + ": " + d;
  }
}

std::string run_case(const std::string& path) {
  Case recorded = read_case(path);
  const std::string name = recorded.function;
#define OP(family, function, Args) \
  if (name == #function) return run<Args>(recorded, &Kernels::function, #family);
#include "ops/ops.def"
#undef OP
  return "there is no operation " + name;
}

// One process's share of the cases; in memory that all of them see, so that the parent knows what a
// process that died was at.
struct Share {
  int passed, failed;
  char at[1024];
};

void run_share(const std::vector<std::string>& paths, size_t first, size_t stride, bool kernels,
               Share& share) {
  for (size_t i = first; i < paths.size(); i += stride) {
    std::snprintf(share.at, sizeof share.at, "%s", paths[i].c_str());
    std::string why;
    simt::stats().kernels.clear();
    try {
      why = run_case(paths[i]);
    } catch (const std::exception& e) {
      why = e.what();
    }
    // One write a line, as the processes share the output.
    std::string line;
    if (kernels) {
      line = "case " + paths[i];
      for (const void* kernel : simt::stats().kernels)
        line += " " + std::to_string(static_cast<const char*>(kernel) -
                                     reinterpret_cast<const char*>(&runner_origin));
      line += "\n";
    }
    ++(why.empty() ? share.passed : share.failed);
    if (!why.empty()) line += "FAIL " + paths[i] + ": " + why + "\n";
    std::fputs(line.c_str(), stdout);
    std::fflush(stdout);
  }
}

}  // namespace
}  // namespace p2r

int main(int argc, char** argv) {
  using simt::Async;
  using simt::Order;
  const std::map<std::string, Order> orders = {{"fifo", Order::Fifo},
                                               {"reverse", Order::Reverse},
                                               {"lifo", Order::Lifo},
                                               {"random", Order::Random},
                                               {"warp", Order::WarpPrio}};
  const std::map<std::string, Async> asyncs = {
      {"early", Async::Early}, {"late", Async::Late}, {"random", Async::Random}};
  std::vector<std::string> paths;
  size_t jobs = 1;
  bool kernels = false;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg == "--order" && i + 1 < argc)
      simt::options().order = orders.at(argv[++i]);
    else if (arg == "--async" && i + 1 < argc)
      simt::options().async = asyncs.at(argv[++i]);
    else if (arg == "--seed" && i + 1 < argc)
      simt::options().seed = std::strtoull(argv[++i], nullptr, 10);
    else if (arg == "--jobs" && i + 1 < argc)
      jobs = std::max<size_t>(1, std::strtoull(argv[++i], nullptr, 10));
    else if (arg == "--kernels")
      kernels = true;
    else if (!std::filesystem::is_directory(arg))
      paths.push_back(arg);
    else
      for (const auto& e : std::filesystem::recursive_directory_iterator(arg))
        if (e.path().extension() == ".case") paths.push_back(e.path().string());
  }
  std::sort(paths.begin(), paths.end());
  auto* shares =
      static_cast<p2r::Share*>(mmap(nullptr, jobs * sizeof(p2r::Share), PROT_READ | PROT_WRITE,
                                    MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  if (shares == MAP_FAILED) return 2;
  std::vector<pid_t> processes;
  for (size_t i = 0; i < jobs; ++i) {
    const pid_t process = fork();
    if (process < 0) return 2;
    if (process == 0) {
      p2r::run_share(paths, i, jobs, kernels, shares[i]);
      std::exit(0);
    }
    processes.push_back(process);
  }
  int passed = 0, failed = 0;
  for (size_t i = 0; i < jobs; ++i) {
    int status = 0;
    waitpid(processes[i], &status, 0);
    passed += shares[i].passed;
    failed += shares[i].failed;
    if (status == 0) continue;
    ++failed;
    if (WIFSIGNALED(status))
      std::printf("FAIL %s: signal %s\n", shares[i].at, strsignal(WTERMSIG(status)));
    else
      std::printf("FAIL %s: the process ended with %d\n", shares[i].at, WEXITSTATUS(status));
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed || !passed;
}

// Replays recorded cases (ops/recording.h) on a device: rebuilds each call, runs it, and compares
// it with the CPU backend's result. Shared by runner.cpp, on the kernel twin, and
// device_runner.cpp, on a GPU.
//
//   <program> [--jobs N] [--kernels] [--shift] [options of the place] CASE|FOLDER...
//
// --jobs N divides the cases among N processes. --kernels prints for each case the kernels that it
// launched, as numbers assigned by the place, and what else the place reports of the launches.
// --shift moves the start of every tensor that a call reads by one element, as views can.
#pragma once
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <future>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "operations.h"  // made by operations.cmake: every header of ops/
#include "ops/backend.h"
#include "ops/half.h"
#include "ops/kernel_choice.h"
#include "ops/recording.h"

namespace p2r::replay {

// A device for one call, and the memory of its tensors.
class Stage {
 public:
  virtual ~Stage() = default;
  virtual Device& device() = 0;
  // All bits set; it lives as long as the stage.
  virtual void* tensor(size_t bytes) = 0;
};

// Where cases are run.
class Place {
 public:
  virtual ~Place() = default;
  // On the chip with the most kernels.
  virtual std::unique_ptr<Stage> open() = 0;
  // Another chip, for a call that queried the stage's chip; or null.
  virtual std::unique_ptr<Stage> open_another(Stage&) { return nullptr; }
  // The kernels launched since it was last called.
  virtual std::vector<long long> launched() = 0;
  // Further lines about the launches since it was last called.
  virtual std::string told() { return ""; }
  // A rule that the calls since it was last called broke, beyond those that stop a kernel.
  virtual std::string broken() { return ""; }
  virtual bool option(const std::string& name, const std::string& value) = 0;
};

inline double entry(const std::vector<char>& bytes, DType dtype, size_t i) {
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
inline std::string difference(const std::vector<char>& bytes, const Field& f, const Bound& bound) {
  const size_t n = static_cast<size_t>(f.view.size());
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
using Function = void (*Kernels::*)(const Args&, Device&);

template <class Args>
std::string run_once(Case& c, Function<Args> function, int64_t kernel, bool shift, Stage& stage) {
  Device& device = stage.device();
  std::map<uint64_t, void*> placed;
  for (Field& f : c.fields) {
    if (!f.view) continue;
    void*& data = placed[f.address];
    if (!data) {
      // The recording device's memory begins at multiples of 64: the rest is where a view begins.
      const bool further = shift && f.kind != Field::Kind::out;
      const size_t skew = (f.address + (further ? size_of(f.view.dtype) : 0)) % 64;
      data = static_cast<char*>(stage.tensor(skew + f.view.bytes())) + skew;
    }
    f.view.data = data;
    if (!f.before.empty()) device.upload(data, f.before.data(), f.before.size());
  }
  Args args;
  restore(args, c.fields);
  if constexpr (requires { args.kernel; }) args.kernel = kernel;
  const std::shared_ptr<uint64_t> fault = device.new_fault_word();
  if constexpr (requires { args.fault; }) args.fault = {fault.get()};
  device.reset_peak();
  [[maybe_unused]] const size_t before = device.live();
  (device.kernels().*function)(args, device);
  // A bound on a GPU's memory: the CPU backend takes more, for each of its threads.
  if constexpr (requires { args.scratch(); })
    if (const size_t took = device.peak() - before;
        device.info().backend != "cpu" && took > static_cast<size_t>(args.scratch()))
      return "took " + std::to_string(took) + " bytes of scratch, and may take " +
             std::to_string(args.scratch());
  std::vector<std::vector<char>> after(c.fields.size());
  for (size_t i = 0; i < c.fields.size(); ++i) {
    after[i].resize(c.fields[i].after.size());
    if (!after[i].empty()) device.download(after[i].data(), c.fields[i].view.data, after[i].size());
  }
  std::promise<std::string> done;
  device.notify([&](const std::string& error) { done.set_value(error); });
  if (std::string error = done.get_future().get(); !error.empty()) return error;
  const uint64_t raised = *static_cast<volatile uint64_t*>(fault.get());
  if (raised != c.fault) return c.fault ? "did not raise the fault of the case" : "raised a fault";
  for (size_t i = 0; i < c.fields.size(); ++i)
    if (!after[i].empty())
      if (std::string d = difference(after[i], c.fields[i], c.bound); !d.empty())
        return "field " + std::to_string(i) + " " + d;
  return "";
}

// An operation with a choice of kernels runs with each that accepts the case, whichever was
// recorded; one that chooses by the chip runs on another chip too.
template <class Args>
std::string run(Case& c, Function<Args> function, [[maybe_unused]] const char* family, bool shift,
                Place& place) {
  std::unique_ptr<Stage> stage = place.open();
  if constexpr (requires(Args args) { args.kernel; }) {
    Args args;
    restore(args, c.fields);
    const AttentionLayout in = attention_layout(args.q, args.k, args.v, args.qkv);
    const bool own = sees_own_sequence(in, args.keys);
    const std::vector<KernelChoice> choices = kernel_choices(family, stage->device().info());
    for (size_t i = 0; i < choices.size(); ++i) {
      if (!choices[i].supports(in.dtype, in.head_dim) || !(own || choices[i].any_keys)) continue;
      if (std::string d = run_once(c, function, static_cast<int64_t>(i), shift, *stage); !d.empty())
        return std::string("kernel ") + choices[i].name + ": " + d;
      stage = place.open();
    }
    return "";
  } else {
    if (std::string d = run_once(c, function, 0, shift, *stage); !d.empty()) return d;
    stage = place.open_another(*stage);
    if (!stage) return "";
    const std::string d = run_once(c, function, 0, shift, *stage);
    return d.empty() ? d : "on chip " + stage->device().info().capability + ": " + d;
  }
}

inline std::string run_case(const std::string& path, bool shift, Place& place) {
  Case recorded = read_case(path);
  const std::string name = recorded.function;
#define OP(family, function, Args) \
  if (name == #function) return run<Args>(recorded, &Kernels::function, #family, shift, place);
#include "ops/ops.def"
#undef OP
  return "there is no operation " + name;
}

// The results of one process; in shared memory, so that the parent knows which case a process that
// died was running.
struct Share {
  int passed, failed;
  char at[1024];
};

inline void run_share(const std::vector<std::string>& paths, size_t first, size_t stride,
                      bool kernels, bool shift, Share& share, Place& place) {
  for (size_t i = first; i < paths.size(); i += stride) {
    std::snprintf(share.at, sizeof share.at, "%s", paths[i].c_str());
    std::string why;
    place.launched();
    place.told();
    place.broken();
    try {
      why = run_case(paths[i], shift, place);
      if (why.empty()) why = place.broken();
    } catch (const std::exception& e) {
      why = e.what();
    }
    // One write per line, since the processes share the output.
    std::string line;
    if (kernels) {
      line = "case " + paths[i];
      for (const long long kernel : place.launched()) {
        line += ' ';
        line += std::to_string(kernel);
      }
      line += "\n" + place.told();
    }
    ++(why.empty() ? share.passed : share.failed);
    if (!why.empty()) line += "FAIL " + paths[i] + ": " + why + "\n";
    std::fputs(line.c_str(), stdout);
    std::fflush(stdout);
  }
}

inline int run_program(int argc, char** argv, Place& place) {
  std::vector<std::string> paths;
  size_t jobs = 1;
  bool kernels = false, shift = false;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg == "--kernels")
      kernels = true;
    else if (arg == "--shift")
      shift = true;
    else if (arg == "--jobs" && i + 1 < argc)
      jobs = std::max<size_t>(1, std::strtoull(argv[++i], nullptr, 10));
    else if (i + 1 < argc && place.option(arg, argv[i + 1]))
      ++i;
    else if (!std::filesystem::is_directory(arg))
      paths.push_back(arg);
    else
      for (const auto& e : std::filesystem::recursive_directory_iterator(arg))
        if (e.path().extension() == ".case") paths.push_back(e.path().string());
  }
  std::sort(paths.begin(), paths.end());
  auto* shares = static_cast<Share*>(mmap(nullptr, jobs * sizeof(Share), PROT_READ | PROT_WRITE,
                                          MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  if (shares == MAP_FAILED) return 2;
  std::vector<pid_t> processes;
  for (size_t i = 0; i < jobs; ++i) {
    const pid_t process = fork();
    if (process < 0) return 2;
    if (process == 0) {
      run_share(paths, i, jobs, kernels, shift, shares[i], place);
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

}  // namespace p2r::replay

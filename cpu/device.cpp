#include "cpu/device.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>

namespace p2r::cpu {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kQueueLimit = 16384;  // closures; past it the caller waits

uint64_t first_number(const char* path) {
  std::ifstream file(path);
  uint64_t value = 0;
  return file >> value ? value : 0;
}

uint64_t memory_limit() {
  struct sysinfo s;
  uint64_t bytes = sysinfo(&s) == 0 ? uint64_t{s.totalram} * s.mem_unit : uint64_t{1} << 33;
  if (uint64_t group = first_number("/sys/fs/cgroup/memory.max"); group && group < bytes)
    bytes = group;
  return bytes;
}

int thread_limit() {
  cpu_set_t set;
  int n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set)
                                                      : int(std::thread::hardware_concurrency());
  std::ifstream quota("/sys/fs/cgroup/cpu.max");
  double share = 0, period = 0;
  if (quota >> share >> period && period > 0)
    n = std::min(n, std::max(1, static_cast<int>(share / period + 0.5)));
  return std::max(n, 1);
}

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  return "CPU";
}

const Simd* choose_simd(const std::string& name) {
  int count;
  const Simd* const* tables = simd_tables(&count);
  if (name.empty()) return tables[0];
  std::string have;
  for (int i = 0; i < count; ++i) {
    if (name == tables[i]->name) return tables[i];
    have += std::string(i ? ", " : "") + tables[i]->name;
  }
  throw Error(Code::device, "simd '" + name + "' is not available on this CPU, which has " + have);
}

std::vector<std::string> names_of(const SimdFeatures& features) {
  std::vector<std::string> names;
  if (features.bf16) names.push_back("bf16");
  if (features.vnni) names.push_back("vnni");
  return names;
}

SimdFeatures choose_features(const Simd& simd, const OpenOptions& options) {
  const SimdFeatures have = simd_features(simd);
  auto choose = [&](const char* name, int wanted, bool has) {
    if (wanted == 1 && !has)
      throw Error(Code::device, std::string("features.") + name + " is not available with simd '" +
                                    simd.name + "' on this CPU");
    return has && wanted != 0;
  };
  return {choose("bf16", options.bf16, have.bf16), choose("vnni", options.vnni, have.vnni)};
}

}  // namespace

CpuDevice::CpuDevice(const OpenOptions& options)
    : info_(cpu_info()),
      simd_(choose_simd(options.simd)),
      features_(choose_features(*simd_, options)),
      pool_(options.threads > 0 ? options.threads : info_.threads) {
  info_.threads = pool_.count();
  info_.simd = simd_->name;
  info_.features = names_of(features_);
  thread_ = std::thread([this] { run(); });
}

CpuDevice::~CpuDevice() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_one();
  thread_.join();
  release_everything();
  for (const auto& [block, bytes] : mapped_) munmap(block, bytes);
  for (const std::string& path : shared_) unlink(path.c_str());
}

void CpuDevice::run() {
  for (;;) {
    std::function<void()> work;
    spin_wait([&] { return stop_ || queued_.load(std::memory_order_relaxed) != completed(); });
    {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return stop_ || !queue_.empty(); });
      if (queue_.empty()) return;
      work = std::move(queue_.front());
      queue_.pop_front();
      if (queue_.size() == kQueueLimit - 1) space_.notify_one();
    }
    work();
    work = nullptr;
    completed_.fetch_add(1, std::memory_order_release);
  }
}

void CpuDevice::submit(std::function<void()> work) {
  {
    std::unique_lock lock(mutex_);
    space_.wait(lock, [&] { return queue_.size() < kQueueLimit; });
    queue_.push_back(std::move(work));
    ++queued_;
  }
  wake_.notify_one();
}

void CpuDevice::launch(int64_t items, int64_t grain, ThreadPool::Body f) {
  if (items <= 0) return;
  submit([this, items, grain, f = std::move(f)] { pool_.parallel(items, grain, f); });
}

void CpuDevice::upload(void* destination, const void* source, size_t bytes) {
  if (completed() == queued_) {  // nothing queued can be using the destination
    std::memcpy(destination, source, bytes);
    return;
  }
  std::shared_ptr<void> staged(std::malloc(bytes), std::free);
  if (!staged) throw Error(Code::memory, "no room for " + std::to_string(bytes) + " bytes");
  std::memcpy(staged.get(), source, bytes);
  submit([=] { std::memcpy(destination, staged.get(), bytes); });
}

void CpuDevice::upload_from(void* destination, size_t bytes, std::function<const void*()> source) {
  submit([=] { std::memcpy(destination, source(), bytes); });
}

void CpuDevice::download(void* destination, const void* source, size_t bytes) {
  copy(destination, source, bytes);
}

void CpuDevice::copy(void* destination, const void* source, size_t bytes) {
  constexpr int64_t kChunk = 1 << 20;
  launch(static_cast<int64_t>(bytes), kChunk, [=](int64_t begin, int64_t end, int) {
    std::memcpy(static_cast<char*>(destination) + begin, static_cast<const char*>(source) + begin,
                end - begin);
  });
}

void CpuDevice::zero(void* destination, size_t bytes) {
  submit([=] { std::memset(destination, 0, bytes); });
}

void CpuDevice::notify(Completion done) {
  submit([done = std::move(done)] { done(""); });
}

void* CpuDevice::map(int file, size_t bytes) {
  // An empty file cannot be mapped; nothing reads the byte.
  const size_t length = std::max<size_t>(bytes, 1);
  void* block = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (block == MAP_FAILED)
    throw Error(Code::memory, "a shared file of " + std::to_string(bytes) +
                                  " bytes could not be mapped: " + std::strerror(errno));
  mapped_[block] = length;
  return block;
}

namespace {

struct OpenFile {
  OpenFile(const std::string& path, int flags, int mode = 0)
      : number(open(path.c_str(), flags | O_CLOEXEC, mode)) {
    if (number < 0) throw Error(Code::io, path + " could not be opened: " + std::strerror(errno));
  }
  ~OpenFile() { close(number); }
  const int number;
};

}  // namespace

std::string CpuDevice::share(void*& block, size_t bytes, const std::string& path) {
  const OpenFile file(path, O_RDWR | O_CREAT | O_EXCL, 0600);
  shared_.insert(path);
  // Space is allocated now: without any left, writing to the mapping would raise SIGBUS.
  if (const int e =
          posix_fallocate(file.number, 0, static_cast<off_t>(std::max<size_t>(bytes, 1)))) {
    unshare(path);
    throw Error(Code::memory, "no room for " + std::to_string(bytes) + " bytes in " + path + ": " +
                                  std::strerror(e));
  }
  void* mapped = map(file.number, bytes);
  copy(mapped, block, bytes);
  block = mapped;
  return path;
}

void* CpuDevice::open_shared(const std::string& name, size_t bytes) {
  const OpenFile file(name, O_RDWR);
  struct stat s;
  if (fstat(file.number, &s) != 0 || !S_ISREG(s.st_mode) ||
      static_cast<uint64_t>(s.st_size) < bytes)
    throw Error(Code::format, name + " must be a file of at least " + std::to_string(bytes) +
                                  " bytes, got " + std::to_string(s.st_size));
  return map(file.number, bytes);
}

void CpuDevice::close_shared(void* block) {
  const auto it = mapped_.find(block);
  const size_t length = it->second;
  mapped_.erase(it);
  submit([block, length] { munmap(block, length); });
}

void CpuDevice::unshare(const std::string& name) {
  if (shared_.erase(name)) unlink(name.c_str());
}

using Clock = std::chrono::steady_clock;

std::shared_ptr<void> CpuDevice::mark() {
  auto point = std::make_shared<Clock::time_point>();
  submit([point] { *point = Clock::now(); });
  return point;
}

double CpuDevice::elapsed(const std::shared_ptr<void>& from, const std::shared_ptr<void>& to) {
  return std::chrono::duration<double, std::milli>(
             *std::static_pointer_cast<Clock::time_point>(to) -
             *std::static_pointer_cast<Clock::time_point>(from))
      .count();
}

std::shared_ptr<Fault> CpuDevice::new_fault(std::string op, std::string text) {
  auto fault = std::make_shared<Fault>();
  auto flag = std::make_shared<int32_t>(0);
  fault->op = std::move(op);
  fault->text = std::move(text);
  fault->flag = flag.get();
  fault->owner = flag;
  return fault;
}

void* CpuDevice::raw_allocate(size_t bytes) {
  if (reserved() + bytes > info_.memory_bytes) return nullptr;
  // Large blocks use huge pages: a page fault per 4 KiB costs more than the arithmetic on them.
  const size_t alignment = bytes >= 2 * kHugePage ? kHugePage : 64;
  void* block = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (block && alignment == kHugePage) madvise(block, bytes, MADV_HUGEPAGE);
  return block;
}

void CpuDevice::raw_release(void* block) { std::free(block); }

void CpuDevice::drain() {
  std::mutex mutex;
  std::condition_variable drained;
  bool done = false;
  submit([&] {
    std::lock_guard lock(mutex);
    done = true;
    drained.notify_one();
  });
  std::unique_lock lock(mutex);
  drained.wait(lock, [&] { return done; });
}

#define OP(family, function, Args) void function(const Args&, Device&);
#include "ops/ops.def"
#undef OP

const Kernels& CpuDevice::kernels() const {
  static const Kernels table = {
#define OP(family, function, Args) &function,
#include "ops/ops.def"
#undef OP
  };
  return table;
}

}  // namespace p2r::cpu

namespace p2r {

DeviceInfo cpu_info() {
  DeviceInfo info;
  int count;
  info.backend = info.id = "cpu";
  info.name = cpu::processor_name();
  info.memory_bytes = cpu::memory_limit();
  info.threads = cpu::thread_limit();
  const cpu::Simd& best = *cpu::simd_tables(&count)[0];
  info.simd = best.name;
  info.features = cpu::names_of(cpu::simd_features(best));
  return info;
}

std::unique_ptr<Device> open_cpu(const OpenOptions& options) {
  return std::make_unique<cpu::CpuDevice>(options);
}

}  // namespace p2r

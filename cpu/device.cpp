#include "cpu/device.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cpu/host.h"
#include "ops/start_thread.h"

namespace p2r::cpu {

namespace {

using host::kHugePage;
constexpr size_t kQueueLimit = 16384;  // closures; past it the caller waits

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
  thread_ = start_thread([this] { run(); });
}

CpuDevice::~CpuDevice() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_one();
  thread_.join();
  release_everything();
  for (const auto& [block, bytes] : mapped_) host::unmap(block, bytes);
  for (const auto& [name, shared] : shared_) host::unshare(shared);
}

void CpuDevice::run() {
  for (;;) {
    Work work;
    spin_wait([&] { return stop_ || queued_.load(std::memory_order_relaxed) != completed(); });
    {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return stop_ || !queue_.empty(); });
      if (queue_.empty()) return;
      work = std::move(queue_.front());
      queue_.pop_front();
      if (queue_.size() == kQueueLimit - 1) space_.notify_one();
    }
    if (work.abort.requested && *work.abort.requested)
      raise({work.abort.word.get()}, 0, 0);
    else
      work.run();
    work = {};
    completed_.fetch_add(1, std::memory_order_release);
  }
}

void CpuDevice::submit(std::function<void()> work) {
  {
    std::unique_lock lock(mutex_);
    space_.wait(lock, [&] { return queue_.size() < kQueueLimit; });
    queue_.push_back({std::move(work), abort_});
    ++queued_;
  }
  wake_.notify_one();
}

void CpuDevice::abandon() {
  std::deque<Work> left_out;
  const std::lock_guard lock(mutex_);
  left_out.swap(queue_);
}

void CpuDevice::wait(uint64_t sequence) {
  while (!spin_wait([&] { return completed() >= sequence; }))
    std::this_thread::sleep_for(std::chrono::microseconds(100));
}

void CpuDevice::launch(int64_t items, int64_t grain, ThreadPool::Body f) {
  if (items <= 0) return;
  submit([this, items, grain, f = std::move(f)] { pool_.parallel(items, grain, f); });
}

void CpuDevice::upload(void* destination, const void* source, size_t bytes) {
  if (!bytes) return;            // the source may be null
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
  if (!bytes) return;
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
  if (!bytes) return;
  submit([=] { std::memset(destination, 0, bytes); });
}

void CpuDevice::notify(Completion done) {
  submit([done = std::move(done)] { done(""); });
}

std::string CpuDevice::share(void*& block, size_t bytes, const std::string& path) {
  host::Shared shared;
  void* mapped = host::share(bytes, path, shared);
  try {
    shared_[shared.name] = shared;
    mapped_[mapped] = bytes;
    copy(mapped, block, bytes);
  } catch (...) {
    mapped_.erase(mapped);
    host::unmap(mapped, bytes);
    host::unshare(shared);
    shared_.erase(shared.name);
    throw;
  }
  block = mapped;
  return std::move(shared.name);  // a copy could fail
}

void* CpuDevice::open_shared(const std::string& name, size_t bytes, bool any_file) {
  void* mapped = host::open_shared(name, bytes, any_file);
  try {
    mapped_[mapped] = bytes;
  } catch (...) {
    host::unmap(mapped, bytes);
    throw;
  }
  return mapped;
}

void CpuDevice::close_shared(void* block) {
  const auto it = mapped_.find(block);
  submit([block, bytes = it->second] { host::unmap(block, bytes); });
  mapped_.erase(it);
}

void CpuDevice::unshare(const std::string& name) {
  const auto it = shared_.find(name);
  if (it == shared_.end()) return;
  host::unshare(it->second);
  shared_.erase(it);
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

void* CpuDevice::raw_allocate(size_t bytes) {
  if (reserved() + bytes > info_.memory_bytes) return nullptr;
  // Large blocks use huge pages: a page fault per 4 KiB costs more than the arithmetic on them.
  const size_t alignment = bytes >= 2 * kHugePage ? kHugePage : 64;
  return host::allocate(alignment, (bytes + alignment - 1) / alignment * alignment);
}

void CpuDevice::raw_release(void* block) { host::release(block); }

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
  info.name = cpu::host::processor_name();
  info.memory_bytes = cpu::host::memory_limit();
  info.threads = cpu::host::thread_limit();
  const cpu::Simd& best = *cpu::simd_tables(&count)[0];
  info.simd = best.name;
  info.features = cpu::names_of(cpu::simd_features(best));
  return info;
}

std::unique_ptr<Device> open_cpu(const OpenOptions& options) {
  return std::make_unique<cpu::CpuDevice>(options);
}

}  // namespace p2r

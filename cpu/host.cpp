#include "cpu/host.h"

#if defined(__linux__)
#include <sched.h>
#include <sys/sysinfo.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#if defined(_WIN32)
#include <malloc.h>
#include <windows.h>
#else
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <thread>

#include "ops/error.h"

namespace p2r::cpu::host {

namespace {

constexpr uint64_t kUnknownMemory = uint64_t{1} << 33;

int hardware_threads() { return std::max(1, int(std::thread::hardware_concurrency())); }

}  // namespace

#if defined(__linux__)

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  return "CPU";
}

uint64_t memory_limit() {
  struct sysinfo s;
  uint64_t bytes = sysinfo(&s) == 0 ? uint64_t{s.totalram} * s.mem_unit : kUnknownMemory;
  std::ifstream file("/sys/fs/cgroup/memory.max");
  if (uint64_t group = 0; file >> group && group && group < bytes) bytes = group;
  return bytes;
}

int thread_limit() {
  cpu_set_t set;
  int n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : hardware_threads();
  std::ifstream quota("/sys/fs/cgroup/cpu.max");
  double share = 0, period = 0;
  if (quota >> share >> period && period > 0)
    n = std::min(n, std::max(1, static_cast<int>(share / period + 0.5)));
  return std::max(n, 1);
}

#elif defined(__APPLE__)

std::string processor_name() {
  char name[256];
  size_t size = sizeof name;
  return sysctlbyname("machdep.cpu.brand_string", name, &size, nullptr, 0) == 0 ? name : "CPU";
}

uint64_t memory_limit() {
  uint64_t bytes = 0;
  size_t size = sizeof bytes;
  return sysctlbyname("hw.memsize", &bytes, &size, nullptr, 0) == 0 ? bytes : kUnknownMemory;
}

int thread_limit() { return hardware_threads(); }

#elif defined(_WIN32)

std::string processor_name() {
  const char* name = std::getenv("PROCESSOR_IDENTIFIER");
  return name ? name : "CPU";
}

uint64_t memory_limit() {
  MEMORYSTATUSEX status;
  status.dwLength = sizeof status;
  return GlobalMemoryStatusEx(&status) ? status.ullTotalPhys : kUnknownMemory;
}

int thread_limit() { return hardware_threads(); }

#else

std::string processor_name() { return "CPU"; }
uint64_t memory_limit() { return kUnknownMemory; }
int thread_limit() { return hardware_threads(); }

#endif

#if defined(_WIN32)

void* allocate(size_t alignment, size_t bytes) { return _aligned_malloc(bytes, alignment); }
void release(void* block) { _aligned_free(block); }

void* create_file(const std::string&, size_t) {
  throw Error(Code::device, "memory cannot be shared with other processes on Windows");
}
void* open_file(const std::string&, size_t) {
  throw Error(Code::device, "memory of other processes cannot be opened on Windows");
}
void unmap(void*, size_t) {}
void remove(const std::string&) {}

#else

void* allocate(size_t alignment, size_t bytes) {
  void* block = std::aligned_alloc(alignment, bytes);
#if defined(MADV_HUGEPAGE)
  if (block && alignment == kHugePage) madvise(block, bytes, MADV_HUGEPAGE);
#endif
  return block;
}

void release(void* block) { std::free(block); }

namespace {

struct OpenFile {
  OpenFile(const std::string& path, int flags, int mode = 0)
      : number(open(path.c_str(), flags | O_CLOEXEC, mode)) {
    if (number < 0) throw Error(Code::io, path + " could not be opened: " + std::strerror(errno));
  }
  ~OpenFile() { close(number); }
  const int number;
};

// An empty file cannot be mapped; nothing reads the byte.
size_t mapped_length(size_t bytes) { return std::max<size_t>(bytes, 1); }

void* map(const OpenFile& file, size_t bytes) {
  void* block =
      mmap(nullptr, mapped_length(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, file.number, 0);
  if (block == MAP_FAILED)
    throw Error(Code::memory, "a shared file of " + std::to_string(bytes) +
                                  " bytes could not be mapped: " + std::strerror(errno));
  return block;
}

// Space is allocated now: without any left, writing to the mapping would raise SIGBUS. macOS can
// only be told the length.
int set_length(const OpenFile& file, size_t bytes) {
  const off_t length = static_cast<off_t>(mapped_length(bytes));
#if defined(__APPLE__)
  return ftruncate(file.number, length) == 0 ? 0 : errno;
#else
  return posix_fallocate(file.number, 0, length);
#endif
}

}  // namespace

void* create_file(const std::string& path, size_t bytes) {
  const OpenFile file(path, O_RDWR | O_CREAT | O_EXCL, 0600);
  try {
    if (const int e = set_length(file, bytes))
      throw Error(Code::memory, "no room for " + std::to_string(bytes) + " bytes in " + path +
                                    ": " + std::strerror(e));
    return map(file, bytes);
  } catch (...) {
    remove(path);
    throw;
  }
}

void* open_file(const std::string& path, size_t bytes) {
  const OpenFile file(path, O_RDWR);
  struct stat s;
  if (fstat(file.number, &s) != 0 || !S_ISREG(s.st_mode) ||
      static_cast<uint64_t>(s.st_size) < bytes)
    throw Error(Code::format, path + " must be a file of at least " + std::to_string(bytes) +
                                  " bytes, got " + std::to_string(s.st_size));
  return map(file, bytes);
}

void unmap(void* block, size_t bytes) { munmap(block, mapped_length(bytes)); }
void remove(const std::string& path) { unlink(path.c_str()); }

#endif

}  // namespace p2r::cpu::host

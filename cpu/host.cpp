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
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

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

void* share(size_t, const std::string&, Shared&) {
  throw Error(Code::device, "memory cannot be shared with other processes on Windows");
}
void* open_shared(const std::string&, size_t, bool) {
  throw Error(Code::device, "memory of other processes cannot be opened on Windows");
}
void unmap(void*, size_t) {}
void unshare(const Shared&) {}

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
      : OpenFile(open(path.c_str(), flags | O_CLOEXEC, mode), path) {}
  OpenFile(int opened, const std::string& what) : number(opened) {
    if (number < 0) throw Error(Code::io, what + " could not be opened: " + std::strerror(errno));
  }
  OpenFile(const OpenFile&) = delete;
  ~OpenFile() {
    if (number >= 0) close(number);
  }
  // The caller closes it.
  int release() { return std::exchange(number, -1); }
  int number;
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

// The files that this process shares. Node closes no environment at process.exit(), nor after an
// exception that nothing caught, so they are unlinked when the process runs its exit handlers.
struct SharedFiles {
  std::mutex mutex;
  std::set<std::string> names;
  const pid_t process = getpid();

  void unlink_all() {
    if (getpid() != process) return;  // a fork's files are its parent's
    std::lock_guard lock(mutex);
    for (const std::string& name : names) unlink(name.c_str());
    names.clear();
  }
};

SharedFiles& shared_files() {
  // Never destroyed: devices may be closed after the exit handlers of this library.
  static SharedFiles* files = [] {
    std::atexit([] { shared_files().unlink_all(); });
    return new SharedFiles;
  }();
  return *files;
}

// Space is allocated now: without any left, writing to the mapping would raise SIGBUS. macOS can
// only be told the length. Signals, such as a profiler's, could interrupt the allocation (EINTR).
int set_length(const OpenFile& file, size_t bytes) {
  const off_t length = static_cast<off_t>(mapped_length(bytes));
#if defined(__APPLE__)
  return ftruncate(file.number, length) == 0 ? 0 : errno;
#else
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  const int error = posix_fallocate(file.number, 0, length);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return error;
#endif
}

}  // namespace

namespace {

void* sized_map(const OpenFile& file, size_t bytes, const std::string& where) {
  if (const int e = set_length(file, bytes))
    throw Error(Code::memory, "no room for " + std::to_string(bytes) + " bytes in " + where + ": " +
                                  std::strerror(e));
  return map(file, bytes);
}

#if defined(F_SEAL_SHRINK)

constexpr const char* kSealedName = "p2r-kernels";
// What the links in /proc/PID/fd lead to.
constexpr const char* kSealedLink = "/memfd:p2r-kernels (deleted)";

bool is_descriptor(const std::string& name) {
  int pid = 0, file = 0, length = 0;
  return std::sscanf(name.c_str(), "/proc/%d/fd/%d%n", &pid, &file, &length) == 2 &&
         name == "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(file);
}

std::string link_of(const std::string& name) {
  char target[64];
  const ssize_t length = readlink(name.c_str(), target, sizeof target);
  if (length < 0)
    throw Error(Code::io, name + " could not be read (" + std::strerror(errno) +
                              "): its handle was disposed, its process has ended, or it runs as "
                              "another user or in another container");
  return std::string(target, static_cast<size_t>(length));
}

void* open_sealed(const std::string& name, size_t bytes) {
  const auto require = [&](bool ok) {
    if (!ok) throw Error(Code::format, name + " is no memory that p2r-kernels shares");
  };
  // Before it is opened, since opening a device or a pipe may have effects.
  require(link_of(name) == kSealedLink);
  const OpenFile file(name, O_RDWR);
  require(link_of("/proc/self/fd/" + std::to_string(file.number)) == kSealedLink);
  const int seals = fcntl(file.number, F_GET_SEALS);
  require(seals >= 0 && (seals & F_SEAL_SHRINK) != 0);
  struct stat s;
  require(fstat(file.number, &s) == 0);
  if (static_cast<uint64_t>(s.st_size) != mapped_length(bytes))
    throw Error(Code::format, name + " must have " + std::to_string(bytes) + " bytes, got " +
                                  std::to_string(s.st_size));
  return map(file, bytes);
}

#endif

}  // namespace

void* share(size_t bytes, const std::string& path, Shared& out) {
  if (!path.empty()) {
    SharedFiles& files = shared_files();
    std::unique_lock lock(files.mutex);
    const OpenFile file(path, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW, 0600);
    files.names.insert(path);
    lock.unlock();
    out.name = path;
    try {
      return sized_map(file, bytes, path);
    } catch (...) {
      unshare(out);
      throw;
    }
  }
#if defined(F_SEAL_SHRINK)
  OpenFile file(memfd_create(kSealedName, MFD_CLOEXEC | MFD_ALLOW_SEALING), "memory to be shared");
  fchmod(file.number, 0600);
  out.name = "/proc/" + std::to_string(getpid()) + "/fd/" + std::to_string(file.number);
  void* block = sized_map(file, bytes, "memory");
  if (fcntl(file.number, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    const int e = errno;
    unmap(block, bytes);
    throw Error(Code::io, std::string("shared memory could not be sealed: ") + std::strerror(e));
  }
  out.file = file.release();
  return block;
#else
  throw Error(Code::device, "this system shares memory by files alone");
#endif
}

void* open_shared(const std::string& name, size_t bytes, bool any_file) {
  if (name.find('\0') != std::string::npos)
    throw Error(Code::value, "a name of shared memory must not have characters of value 0");
#if defined(F_SEAL_SHRINK)
  if (is_descriptor(name)) return open_sealed(name, bytes);
#endif
  if (!any_file)
    throw Error(Code::value,
                name +
                    " is a file, which its owner may shorten at any time, and that would end "
                    "this process; { anyFile: true } opens it");
  // Without waiting, should it be a pipe.
  const OpenFile file(name, O_RDWR | O_NOFOLLOW | O_NONBLOCK);
  struct stat s;
  if (fstat(file.number, &s) != 0 || !S_ISREG(s.st_mode) ||
      static_cast<uint64_t>(s.st_size) < bytes)
    throw Error(Code::format, name + " must be a file of at least " + std::to_string(bytes) +
                                  " bytes, got " + std::to_string(s.st_size));
  return map(file, bytes);
}

void unmap(void* block, size_t bytes) { munmap(block, mapped_length(bytes)); }

void unshare(const Shared& shared) {
  if (shared.file >= 0) {
    close(shared.file);
    return;
  }
  SharedFiles& files = shared_files();
  std::lock_guard lock(files.mutex);
  if (files.names.erase(shared.name)) unlink(shared.name.c_str());
}

#endif

}  // namespace p2r::cpu::host

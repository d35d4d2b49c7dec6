// What the CPU backend takes from the operating system. Linux is tested; macOS and Windows are
// written by their documentation and have not been run.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace p2r::cpu::host {

std::string processor_name();
// Bytes of memory, and CPUs, that this process may use: by affinity and cgroup on Linux.
uint64_t memory_limit();
int thread_limit();

// `bytes` is a multiple of `alignment`. Null where there is no memory. An alignment of kHugePage
// asks for huge pages where the system has them.
constexpr size_t kHugePage = size_t{2} << 20;
void* allocate(size_t alignment, size_t bytes);
void release(void* block);

// Memory that other processes map by its name.
struct Shared {
  std::string name;
  int file = -1;  // held open, so that the name stays valid; -1 where the name is a path
};
// Maps new memory. Without a path it has no file, and is sealed: a process that reads memory which
// another has shortened is ended (SIGBUS). Errors: Code::io, memory, device.
void* share(size_t bytes, const std::string& path, Shared& out);
// Maps what `share` gave in some process; with `any_file`, the regular file at the path `name`, of
// `bytes` at least, which nobody may shorten. Errors: Code::io, memory, format, value.
void* open_shared(const std::string& name, size_t bytes, bool any_file);
void unmap(void* block, size_t bytes);
// From now on the name opens nothing.
void unshare(const Shared& shared);

}  // namespace p2r::cpu::host

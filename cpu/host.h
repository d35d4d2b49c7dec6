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

// A file of so many bytes, mapped to be shared with other processes: a new one, readable by its
// owner alone, and one that is there and at least as long. Errors: Code::io, memory, format.
void* create_file(const std::string& path, size_t bytes);
void* open_file(const std::string& path, size_t bytes);
void unmap(void* block, size_t bytes);
void remove(const std::string& path);

}  // namespace p2r::cpu::host

// Lets one chosen allocation of the addon fail. Preloaded before node (LD_PRELOAD), it stands
// before the C library's and C++'s allocation functions; required by node as well, it exports
//
//   arm(n, ownThread)  the n-th allocation from now on fails: of this thread, or of all others
//   disarm()           { left, failed, at }: how far it was, whether one failed, and where
//   outstanding()      blocks of operator new and malloc that the addon holds
//   holders()          where those were allocated, offsets in the addon by how many
//
// Only the addon's own allocations count, and those that libstdc++ makes for it: V8 ends the
// process when it has no memory.
//
//   g++ -std=c++20 -O2 -shared -fPIC -I<node-api-headers> failing_allocations.cpp
#include <execinfo.h>
#include <link.h>
#include <node_api.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <string>
#include <unordered_map>

extern "C" {
void* __libc_malloc(size_t);
void __libc_free(void*);
void* __libc_memalign(size_t, size_t);
}

namespace {

// This file's own blocks, of which nothing counts.
template <class T>
struct Own {
  using value_type = T;
  Own() = default;
  template <class U>
  Own(const Own<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(__libc_malloc(n * sizeof(T))); }
  void deallocate(T* p, size_t) { __libc_free(p); }
  template <class U>
  bool operator==(const Own<U>&) const {
    return true;
  }
};
using Held = std::unordered_map<void*, uintptr_t, std::hash<void*>, std::equal_to<void*>,
                                Own<std::pair<void* const, uintptr_t>>>;

struct Range {
  uintptr_t base = 0, end = 0;
  bool has(uintptr_t at) const { return at >= base && at < end; }
};
Range addon, runtime;
std::atomic<bool> watching{false}, armed{false}, own_thread{true};
std::atomic<int64_t> countdown{0};
std::atomic<uintptr_t> failed_at{0};
thread_local bool arms = false, busy = false;
std::mutex mutex;
Held& held() {
  static Held& map = *new (__libc_malloc(sizeof(Held))) Held;
  return map;
}

int find(dl_phdr_info* info, size_t, void*) {
  Range range{info->dlpi_addr, info->dlpi_addr};
  for (int i = 0; i < info->dlpi_phnum; ++i)
    if (const auto& p = info->dlpi_phdr[i]; p.p_type == PT_LOAD)
      range.end = std::max<uintptr_t>(range.end, info->dlpi_addr + p.p_vaddr + p.p_memsz);
  if (std::strstr(info->dlpi_name, "p2r_kernels.node")) addon = range;
  if (std::strstr(info->dlpi_name, "libstdc++.so")) runtime = range;
  return 0;
}

// Where in the addon the allocation is made; 0 if it is another's.
uintptr_t place(void* caller) {
  if (!watching || busy) return 0;
  const auto at = reinterpret_cast<uintptr_t>(caller);
  if (addon.has(at)) return at - addon.base;
  if (!runtime.has(at)) return 0;
  void* frames[12];
  busy = true;
  const int n = backtrace(frames, 12);
  busy = false;
  bool inside = false;
  for (int i = 0; i < n; ++i) {
    const auto frame = reinterpret_cast<uintptr_t>(frames[i]);
    if (runtime.has(frame))
      inside = true;
    else if (inside)
      return addon.has(frame) ? frame - addon.base : 0;
  }
  return 0;
}

bool fails(uintptr_t at) {
  if (!at || !armed || arms != own_thread || --countdown != 0) return false;
  failed_at = at;
  return true;
}

void* taken(void* block, uintptr_t at) {
  if (block && at) {
    std::lock_guard lock(mutex);
    held()[block] = at;
  }
  return block;
}

void given_back(void* block) {
  if (block && watching) {
    std::lock_guard lock(mutex);
    held().erase(block);
  }
  __libc_free(block);
}

void* make(size_t bytes, void* caller) {
  const uintptr_t at = place(caller);
  return fails(at) ? nullptr : taken(__libc_malloc(bytes ? bytes : 1), at);
}

}  // namespace

#define CALLER __builtin_return_address(0)

extern "C" {
void* malloc(size_t bytes) {
  const uintptr_t at = addon.has(reinterpret_cast<uintptr_t>(CALLER)) ? place(CALLER) : 0;
  if (fails(at)) {
    errno = ENOMEM;
    return nullptr;
  }
  return taken(__libc_malloc(bytes), at);
}
void free(void* block) { given_back(block); }
// The device's memory, which the device counts itself.
void* aligned_alloc(size_t alignment, size_t bytes) {
  return fails(place(CALLER)) ? nullptr : __libc_memalign(alignment, bytes);
}
}

void* operator new(size_t bytes) {
  if (void* block = make(bytes, CALLER)) return block;
  throw std::bad_alloc();
}
void* operator new[](size_t bytes) {
  if (void* block = make(bytes, CALLER)) return block;
  throw std::bad_alloc();
}
void* operator new(size_t bytes, const std::nothrow_t&) noexcept { return make(bytes, CALLER); }
void* operator new[](size_t bytes, const std::nothrow_t&) noexcept { return make(bytes, CALLER); }
void operator delete(void* block) noexcept { given_back(block); }
void operator delete[](void* block) noexcept { given_back(block); }
void operator delete(void* block, size_t) noexcept { given_back(block); }
void operator delete[](void* block, size_t) noexcept { given_back(block); }

namespace {

napi_value number(napi_env env, double value) {
  napi_value out;
  napi_create_double(env, value, &out);
  return out;
}

napi_value arm(napi_env env, napi_callback_info info) {
  if (!watching) {
    void* frames[1];
    backtrace(frames, 1);  // which allocates when it is first called
    dl_iterate_phdr(find, nullptr);
    if (!addon.end || !runtime.end) {
      napi_throw_error(env, nullptr, "the addon is not loaded, or holds a C++ library of its own");
      return nullptr;
    }
    watching = true;
  }
  size_t count = 2;
  napi_value values[2];
  napi_get_cb_info(env, info, &count, values, nullptr, nullptr);
  int64_t n = 0;
  bool own = true;
  napi_get_value_int64(env, values[0], &n);
  napi_get_value_bool(env, values[1], &own);
  arms = true;
  own_thread = own;
  failed_at = 0;
  countdown = n;
  armed = true;
  return nullptr;
}

napi_value disarm(napi_env env, napi_callback_info) {
  armed = false;
  napi_value out, failed;
  napi_create_object(env, &out);
  napi_get_boolean(env, failed_at != 0, &failed);
  napi_set_named_property(env, out, "left", number(env, static_cast<double>(countdown)));
  napi_set_named_property(env, out, "failed", failed);
  napi_set_named_property(env, out, "at", number(env, static_cast<double>(failed_at)));
  return out;
}

napi_value outstanding(napi_env env, napi_callback_info) {
  std::lock_guard lock(mutex);
  return number(env, static_cast<double>(held().size()));
}

napi_value holders(napi_env env, napi_callback_info) {
  std::map<uintptr_t, int> places;
  {
    std::lock_guard lock(mutex);
    for (const auto& [block, at] : held()) ++places[at];
  }
  napi_value out;
  napi_create_object(env, &out);
  for (const auto& [at, count] : places)
    napi_set_named_property(env, out, std::to_string(at).c_str(), number(env, count));
  return out;
}

}  // namespace

extern "C" napi_value napi_register_module_v1(napi_env env, napi_value exports) {
  const std::pair<const char*, napi_callback> functions[] = {
      {"arm", arm}, {"disarm", disarm}, {"outstanding", outstanding}, {"holders", holders}};
  for (const auto& [name, function] : functions) {
    napi_value made;
    napi_create_function(env, name, NAPI_AUTO_LENGTH, function, nullptr, &made);
    napi_set_named_property(env, exports, name, made);
  }
  return exports;
}

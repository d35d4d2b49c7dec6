// The runtime's annotations for the sanitizers. Every function here is empty in the plain build.
// TSan: each fiber, and each hardware unit that accesses memory asynchronously (TMA, a warp's
// tensor core), is a thread; the runtime's own accesses are hidden and the emulated ones reported.
#pragma once
#include <cstddef>

#if SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if SIMT_TSAN
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_acquire(void* tag);
void __tsan_release(void* tag);
void __tsan_read_range(void* p, unsigned long bytes);
void __tsan_write_range(void* p, unsigned long bytes);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace simt::watch {

// The address of a happens-before edge.
using Tag = char;

#if SIMT_TSAN
constexpr unsigned no_edge = 1;  // a switch between fibers orders nothing by itself
inline void* new_identity() { return __tsan_create_fiber(0); }
inline void drop_identity(void* id) { __tsan_destroy_fiber(id); }
inline void* own_identity() { return __tsan_get_current_fiber(); }
inline void become(void* id) { __tsan_switch_to_fiber(id, no_edge); }
inline void acquire(const void* tag) { __tsan_acquire(const_cast<void*>(tag)); }
inline void release(const void* tag) { __tsan_release(const_cast<void*>(tag)); }
inline void hide() {
  AnnotateIgnoreReadsBegin("", 0);
  AnnotateIgnoreWritesBegin("", 0);
}
inline void show() {
  AnnotateIgnoreReadsEnd("", 0);
  AnnotateIgnoreWritesEnd("", 0);
}
// Only inside a Quiet scope.
inline void reads(const void* p, size_t bytes) {
  show();
  __tsan_read_range(const_cast<void*>(p), bytes);
  hide();
}
inline void writes(const void* p, size_t bytes) {
  show();
  __tsan_write_range(const_cast<void*>(p), bytes);
  hide();
}
#else
inline void* new_identity() { return nullptr; }
inline void drop_identity(void*) {}
inline void* own_identity() { return nullptr; }
inline void become(void*) {}
inline void acquire(const void*) {}
inline void release(const void*) {}
inline void hide() {}
inline void show() {}
inline void reads(const void*, size_t) {}
inline void writes(const void*, size_t) {}
#endif

// Hides the runtime's own accesses, which are not the program's.
struct Quiet {
  Quiet() { hide(); }
  ~Quiet() { show(); }
  Quiet(const Quiet&) = delete;
};

// Attributes accesses to another identity until the end of the scope.
class As {
 public:
  explicit As(void* id) : before_(own_identity()) {
    become(id);
    hide();
  }
  ~As() {
    show();
    become(before_);
  }
  As(const As&) = delete;

 private:
  void* before_;
};

#if SIMT_ASAN
inline void forbid(const void* p, size_t bytes) { __asan_poison_memory_region(p, bytes); }
inline void allow(const void* p, size_t bytes) { __asan_unpoison_memory_region(p, bytes); }
inline bool forbidden(const void* p, size_t bytes) {
  return bytes && __asan_region_is_poisoned(const_cast<void*>(p), bytes);
}
#else
inline void forbid(const void*, size_t) {}
inline void allow(const void*, size_t) {}
inline bool forbidden(const void*, size_t) { return false; }
#endif

}  // namespace simt::watch

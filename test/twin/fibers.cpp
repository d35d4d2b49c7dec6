// Stackful coroutines: six pushes and a stack switch on x86-64, ucontext elsewhere.
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <mutex>

#include "test/twin/block.h"

#if !SIMT_USE_UCONTEXT
extern "C" void simt_switch_stack(void** save, void* load);
asm(R"(
.text
.globl simt_switch_stack
.type simt_switch_stack,@function
simt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stack, .-simt_switch_stack
)");
#endif

namespace simt {
namespace {

// Stacks outlive launches: mapping hundreds of them for every small test would dominate its time.
// Each has an inaccessible page below it, so an overflow faults at the kernel's line.
struct Stack {
  char* base;
  size_t bytes;
  void* identity;
};
std::mutex spare_mutex;
std::vector<Stack>& spare_stacks() {
  static auto* stacks = new std::vector<Stack>;
  return *stacks;
}

}  // namespace

void adopt_os_thread(Context& c) {
  c.identity = watch::own_identity();
#if SIMT_ASAN
  pthread_attr_t attributes;
  void* base;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &base, &c.stack_bytes);
  pthread_attr_destroy(&attributes);
  c.stack = static_cast<char*>(base);
#endif
}

void give_stack(Context& c, size_t bytes) {
  {
    std::lock_guard<std::mutex> lock(spare_mutex);
    auto& spare = spare_stacks();
    if (!spare.empty() && spare.back().bytes == bytes) {
      c.stack = spare.back().base;
      c.identity = spare.back().identity;
      c.stack_bytes = bytes;
      spare.pop_back();
      return;
    }
  }
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  void* mapped = mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED || mprotect(mapped, page, PROT_NONE) != 0)
    throw Error("simt: no memory for fiber stacks");
  c.stack = static_cast<char*>(mapped) + page;
  c.stack_bytes = bytes;
  c.identity = watch::new_identity();
}

void return_stack(Context& c) {
  if (!c.stack) return;
  std::lock_guard<std::mutex> lock(spare_mutex);
  spare_stacks().push_back({c.stack, c.stack_bytes, c.identity});
  c.stack = nullptr;
}

void prepare(Context& c, void (*entry)()) {
  watch::allow(c.stack, c.stack_bytes);
#if SIMT_USE_UCONTEXT
  getcontext(&c.machine);
  c.machine.uc_stack.ss_sp = c.stack;
  c.machine.uc_stack.ss_size = c.stack_bytes;
  c.machine.uc_link = nullptr;
  makecontext(&c.machine, entry, 0);
#else
  void** top = reinterpret_cast<void**>(c.stack + c.stack_bytes);
  *--top = nullptr;  // the return address of entry: where a backtrace ends
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  c.stack_pointer = top;
#endif
}

void switch_to(Context& from, Context& to, [[maybe_unused]] bool never_back) {
  watch::become(to.identity);
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(never_back ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#if SIMT_USE_UCONTEXT
  swapcontext(&from.machine, &to.machine);
#else
  simt_switch_stack(&from.stack_pointer, to.stack_pointer);
#endif
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void entered() {
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

}  // namespace simt

// Runs CUDA C++ kernels on the CPU: every CUDA thread is a fiber, a block is a scheduler of fibers.
// This header provides what nvcc has built in: keywords, built-in variables, and the operations
// that implement cuda/ptx.cuh's instructions. Only the twin's build includes it.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

// The toolkit headers above define these for their own use, so they are replaced only after them.
// __noinline__ stays as it is: libstdc++ writes __attribute__((__noinline__)).
#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#undef __shared__
#undef __grid_constant__
#undef __align__
#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
// Shared memory is allocated in the block's arena, where it is poisoned and bounds-checked.
#define __shared__ TWIN_ERROR_declare_shared_memory_with_SMEM_DYN_or_SMEM_ARRAY

namespace simt {

// Where a kernel called an operation; filled in by default arguments.
struct Where {
  const char* file;
  int line;
};
#define SIMT_HERE ::simt::Where at = {__builtin_FILE(), __builtin_LINE()}

// A kernel broke a rule of the hardware: misuse, deadlock, out of bounds.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Which of the runnable threads runs next. WarpPrio lets one warp run far ahead of the others.
enum class Order { Fifo, Reverse, Lifo, Random, WarpPrio };
// When asynchronous operations take effect, within what is legal.
enum class Async { Early, Late, Random };

struct Wgmma {
  int n;
  bool bf16, a_mn_major, b_mn_major, accumulate;
  uint64_t a_desc, b_desc;
};

struct Options {
  Order order = Order::Fifo;
  Async async = Async::Late;
  uint64_t seed = 1;
  bool poison = true;      // shared memory, targets of copies and accumulators in flight hold NaN
  unsigned threads = 1;    // OS threads that the blocks of a launch are spread over
  size_t stack_bytes = 0;  // 0: 64 KB, and 256 KB under a sanitizer
  size_t shared_limit = 227 * 1024;
  int multiprocessors = 4;  // what cudaDeviceGetAttribute reports
  int compute_capability = 90;
  // Called for every wgmma that a warp issues, on the OS thread of its block.
  std::function<void(const Wgmma& op, bool a_in_registers, int warp)> on_wgmma;
};
Options& options();

struct Stats {
  uint64_t resumes = 0, collectives = 0, blocks = 0;
  size_t shared_high = 0;
  uint64_t synchronisations = 0;  // calls that wait for the device, or copy from it to the host
  std::set<const void*> kernels;  // that were launched
};
Stats& stats();

struct Warp;
struct Thread {
  uint3 thread_index{}, block_index{};
  dim3 block_dim, grid_dim;
  int linear = 0, lane = 0;
  Warp* warp = nullptr;
};
extern __thread Thread* current;

[[noreturn]] void fail(const std::string& message, Where at);

// Empty when the device would accept this launch, else the reason why not.
std::string launch_problem(dim3 grid, dim3 block, size_t shared_bytes);
// Without the opt-in, a block's static and dynamic shared memory together are at most 48 KB.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, bool shared_opt_in,
              const std::function<void()>& body);

// ---- barriers and warp collectives ----
enum class Reduce { count, all, any };
void sync_threads(Where at);
void bar_sync(int id, int threads, Where at);
void bar_arrive(int id, int threads, Where at);
int sync_threads_reduce(int predicate, Reduce how, Where at);

void warp_sync(uint32_t mask, Where at);
uint32_t active_mask(Where at);
uint32_t match_any(uint32_t mask, uint64_t value, Where at);
uint32_t match_all(uint32_t mask, uint64_t value, int* all_equal, Where at);
uint32_t ballot(uint32_t mask, int predicate, Where at);
uint32_t reduce_add(uint32_t mask, uint32_t value, Where at);
enum class Shuffle { index, up, down, bfly };
uint64_t shuffle_bits(Shuffle kind, uint32_t mask, uint64_t bits, int operand, int width, Where at);

template <class T>
T shuffle(Shuffle kind, uint32_t mask, T value, int operand, int width, Where at) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = shuffle_bits(kind, mask, bits, operand, width, at);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

// ---- shared memory ----
void* shared_dynamic();
void* shared_array(const void* site, size_t bytes, size_t align, Where at);
uint32_t shared_address(const void* pointer, Where at);
void* shared_pointer(uint32_t address);
void shared_check(uint32_t address, size_t bytes, const char* what, Where at);

// ---- asynchronous copies ----
void cp_async(uint32_t dst, const void* src, int bytes, int valid_bytes, Where at);
void cp_async_commit();
void cp_async_wait(int groups_left);

void mbar_init(uint32_t bar, int count, Where at);
void mbar_arrive(uint32_t bar, int expect_bytes, Where at);
void mbar_expect(uint32_t bar, int bytes, Where at);
void mbar_wait(uint32_t bar, int parity, Where at);

enum class Swizzle : uint8_t { none, b128, b64, b32 };  // numbered as in wgmma's descriptors
enum class Element : uint8_t { u8, i32, f16, bf16, f32 };
size_t element_bytes(Element e);

// In place of the driver's CUtensorMap, with its size and alignment.
struct alignas(64) TensorMap {
  void* base;
  uint64_t dim[5], stride[5];  // strides in bytes; stride[0] is the element
  uint16_t box[5];
  uint8_t rank;
  Element element;
  Swizzle swizzle;
};
static_assert(sizeof(TensorMap) == 128);

void tma_load(uint32_t dst, const TensorMap& map, uint32_t bar, const int* coord, int rank,
              Where at);
void tma_store(const TensorMap& map, uint32_t src, const int* coord, int rank, bool add, Where at);
void bulk_reduce_add(float* dst, uint32_t src, uint32_t bytes, Where at);
void tma_commit();
void tma_wait(int groups_left, bool only_read);
void fence_proxy_async();

// ---- matrix instructions ----
void ldmatrix(uint32_t* regs, int count, bool transposed, uint32_t row_address, Where at);
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, bool bf16, Where at);

// a_regs null: A comes from shared memory by a_desc.
void wgmma(float* d, const uint32_t* a_regs, const Wgmma& op, Where at);
void wgmma_fence(Where at);
void wgmma_commit(Where at);
void wgmma_wait(int groups_left, Where at);
// setmaxnreg, `increase` or not.
void set_max_registers(int count, bool increase, Where at);

template <class... P, class... A>
void run_kernel(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
                bool shared_opt_in, A&&... args) {
  stats().kernels.insert(reinterpret_cast<const void*>(kernel));
  const std::tuple<std::decay_t<P>...> held(std::forward<A>(args)...);
  run_grid(grid, block, shared_bytes, shared_opt_in, [&] { std::apply(kernel, held); });
}

}  // namespace simt

#define threadIdx (::simt::current->thread_index)
#define blockIdx (::simt::current->block_index)
#define blockDim (::simt::current->block_dim)
#define gridDim (::simt::current->grid_dim)
constexpr int warpSize = 32;

#include "test/twin/intrinsics.h"

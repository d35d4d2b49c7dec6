// Every PTX instruction, kernel launch and declaration of shared memory, and the only file that
// depends on the build: nvcc's, or the twin's (P2R_TWIN), where g++ compiles the same kernels and
// test/twin runs them on the CPU.
//
// Rules for kernels, so that one source serves both builds:
//  - no PTX, no <<<>>>, no __shared__ and no #ifdef outside this file;
//  - fast maths through ptx::ex2 and ptx::lg2; never __expf and its like;
//  - a wait is one call (mbar_wait, cp_async_wait, wgmma_wait): a polling loop in a kernel would
//    never yield to another thread of the twin;
//  - registers are passed as arrays by reference and not copied while an instruction is in flight;
//  - loops over register arrays are unrolled, so that they stay registers;
//  - blocks are multiples of 32 threads, and warp operations name the lanes that take part.
//
// Instructions of sm_90 compile everywhere and trap below sm_90 (wgmma and setmaxnreg: outside
// sm_90a), so a kernel needs no guard; the launcher chooses the kernel for the device. A large
// kernel leaves its body out of builds that cannot run it: `if constexpr (ptx::on_sm90a)`.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>

#include "ops/error.h"
#include "ops/fault.h"

#ifdef P2R_TWIN

#include "test/twin/simt.h"

#define SMEM_DYN(name) unsigned char* name = static_cast<unsigned char*>(::simt::shared_dynamic())
#define SMEM_ARRAY(T, name, N)                             \
  static const char name##_site = 0;                       \
  auto& name = *static_cast<T(*)[N]>(::simt::shared_array( \
      &name##_site, sizeof(T) * (N), alignof(T) < 16 ? 16 : alignof(T), {__FILE__, __LINE__}))
#define P2R_PTX inline
// Trailing parameters that give the twin the source line of a call.
#define P2R_HERE SIMT_HERE
#define P2R_AND_HERE , SIMT_HERE

#else

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SMEM_DYN(name) extern __shared__ __align__(1024) unsigned char name[]
#define SMEM_ARRAY(T, name, N) __shared__ T name[N]
#define P2R_PTX __device__ __forceinline__
#define P2R_HERE
#define P2R_AND_HERE
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define P2R_SM90 1
#endif
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define P2R_SM90A 1
#endif

#endif

namespace p2r::cuda {

#ifdef P2R_TWIN
using TensorMap = simt::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// exp(x) is ptx::ex2(x * kLog2e), log(x) is ptx::lg2(x) * kLn2.
inline constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Numbered as in wgmma's matrix descriptors.
enum class Swizzle : uint8_t { none, b128, b64, b32 };
enum class Element : uint8_t { u8, i32, f16, bf16, f32 };

// A launch may have 48 KB of shared memory, static and dynamic together, unless it opts in to more.
// Static arrays are below 16 KB, so that no launch of less dynamic memory than this needs to.
constexpr size_t kSharedWithoutOptIn = 32 * 1024;

// Launches a kernel on a stream, and opts in where its dynamic shared memory may need it.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, cudaStream_t stream,
            A&&... args) {
#ifdef P2R_TWIN
  (void)stream;
  if (const std::string problem = simt::launch_problem(grid, block, smem); !problem.empty())
    throw Error(Code::cuda, "kernel launch: " + problem);
  simt::run_kernel(kernel, grid, block, smem, smem > kSharedWithoutOptIn, std::forward<A>(args)...);
#else
  cudaError_t status = cudaSuccess;
  if (smem > kSharedWithoutOptIn)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(smem));
  if (status == cudaSuccess) {
    // clang-format off
    kernel<<<grid, block, smem, stream>>>(static_cast<P>(std::forward<A>(args))...);
    // clang-format on
    status = cudaGetLastError();
  }
  if (status != cudaSuccess)
    throw Error(Code::cuda, std::string("kernel launch: ") + cudaGetErrorString(status));
#endif
}

// Encodes a map whose arguments tensor_map.cuh has checked. Returns null, or the driver's error.
inline const char* encode_tensor_map(TensorMap& map, Element element, Swizzle swizzle, int rank,
                                     void* base, const uint64_t* dims, const uint64_t* strides,
                                     const uint32_t* box) {
#ifdef P2R_TWIN
  map = TensorMap{};
  map.base = base;
  map.rank = uint8_t(rank);
  map.element = simt::Element(element);
  map.swizzle = simt::Swizzle(swizzle);
  map.stride[0] = simt::element_bytes(map.element);
  for (int i = 0; i < rank; ++i) {
    map.dim[i] = dims[i];
    map.box[i] = uint16_t(box[i]);
    if (i) map.stride[i] = strides[i - 1];
  }
  return nullptr;
#else
  using Encode =
      CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                   const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                   CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                         &result) != cudaSuccess ||
        result != cudaDriverEntryPointSuccess)
      found = nullptr;
    return reinterpret_cast<Encode>(found);
  }();
  if (!encode) return "the driver has no cuTensorMapEncodeTiled";
  static const CUtensorMapDataType types[] = {
      CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_DATA_TYPE_INT32, CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT32};
  static const CUtensorMapSwizzle swizzles[] = {
      CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_SWIZZLE_32B};
  cuuint64_t sizes[5], pitches[5];
  cuuint32_t boxes[5], steps[5];
  for (int i = 0; i < rank; ++i) {
    sizes[i] = dims[i];
    boxes[i] = box[i];
    steps[i] = 1;
    if (i) pitches[i - 1] = strides[i - 1];
  }
  const CUresult status =
      encode(&map, types[int(element)], cuuint32_t(rank), base, sizes, pitches, boxes, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzles[int(swizzle)],
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? nullptr : "the driver refused it";
#endif
}

}  // namespace p2r::cuda

namespace p2r::cuda::ptx {

// Whether this build can run wgmma and setmaxnreg.
#if defined(P2R_TWIN) || defined(P2R_SM90A)
inline constexpr bool on_sm90a = true;
#else
inline constexpr bool on_sm90a = false;
#endif

// Several threads may raise a fault at once. The word is in mapped host memory, where atomics hold
// among the threads of one device.
P2R_PTX void raise(const FaultFlag& fault, int64_t index, uint32_t value, bool of_mask = false) {
#ifdef P2R_TWIN
  p2r::raise(fault, index, value, of_mask);
#else
  atomicMax(reinterpret_cast<unsigned long long*>(fault.word),
            static_cast<unsigned long long>(fault_word(fault.first + index, value, of_mask)));
#endif
}

// In place of a kernel's body in builds that leave it out.
P2R_PTX void trap() {
#ifndef P2R_TWIN
  __trap();
#endif
}

template <class T>
inline constexpr bool is_half = std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>;
template <class T>
inline constexpr bool is_bf16 = std::is_same_v<T, __nv_bfloat16>;

// ---- addresses and arithmetic ----
// The 32-bit address that shared-memory instructions take.
P2R_PTX uint32_t smem_u32(const void* p P2R_AND_HERE) {
#ifdef P2R_TWIN
  return simt::shared_address(p, at);
#else
  return uint32_t(__cvta_generic_to_shared(p));
#endif
}

// 2 to the power x. Denormal results are flushed to zero, as are denormal inputs of the others.
P2R_PTX float ex2(float x) {
#ifdef P2R_TWIN
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

P2R_PTX float lg2(float x) {
#ifdef P2R_TWIN
  return log2f(x);
#else
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Two values rounded to T in one register, the first in the low half.
template <class T>
P2R_PTX uint32_t pack2(float lo, float hi) {
  static_assert(is_half<T>);
  uint32_t bits;
  if constexpr (is_bf16<T>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
    memcpy(&bits, &pair, 4);
  } else {
    const __half2 pair = __floats2half2_rn(lo, hi);
    memcpy(&bits, &pair, 4);
  }
  return bits;
}

// ---- named barriers: id 0 is __syncthreads'; `threads` is a multiple of 32 ----
P2R_PTX void bar_sync(int id, int threads P2R_AND_HERE) {
#ifdef P2R_TWIN
  simt::bar_sync(id, threads, at);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

P2R_PTX void bar_arrive(int id, int threads P2R_AND_HERE) {
#ifdef P2R_TWIN
  simt::bar_arrive(id, threads, at);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// ---- cp.async: each thread waits for its own copies ----
// Copies 16 bytes, or writes 16 zero bytes if !inside; src must be a valid address either way.
P2R_PTX void cp_async16(uint32_t dst, const void* src, bool inside = true P2R_AND_HERE) {
#ifdef P2R_TWIN
  simt::cp_async(dst, src, 16, inside ? 16 : 0, at);
#else
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes)
               : "memory");
#endif
}

P2R_PTX void cp_async_commit() {
#ifdef P2R_TWIN
  simt::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Returns when at most N of the committed groups are still in flight.
template <int N>
P2R_PTX void cp_async_wait() {
#ifdef P2R_TWIN
  simt::cp_async_wait(N);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// ---- mma.sync ----
// Lane l gives the address of row l % 8 of matrix l / 8. Transposed: each 8 x 8 matrix is.
template <bool Transposed = false>
P2R_PTX void ldmatrix_x2(uint32_t (&r)[2], uint32_t row P2R_AND_HERE) {
#ifdef P2R_TWIN
  simt::ldmatrix(r, 2, Transposed, row, at);
#else
  if constexpr (Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row)
                 : "memory");
#endif
}

template <bool Transposed = false>
P2R_PTX void ldmatrix_x4(uint32_t (&r)[4], uint32_t row P2R_AND_HERE) {
#ifdef P2R_TWIN
  simt::ldmatrix(r, 4, Transposed, row, at);
#else
  if constexpr (Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
#endif
}

// d[16][8] += a[16][16] b[16][8]
template <class T>
P2R_PTX void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                          const uint32_t (&b)[2] P2R_AND_HERE) {
#ifdef P2R_TWIN
  static_assert(is_half<T>);
  simt::mma_m16n8k16(d, a, b, is_bf16<T>, at);
#else
  static_assert(is_half<T>);
  if constexpr (is_bf16<T>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// ---- mbarriers ----
// A phase completes when all of its arrivals and all expected bytes have arrived. mbar_wait(bar,
// parity) returns when the phase of that parity has completed: the first phase has parity 0, and
// waiting for parity 1 on a fresh barrier returns at once.
P2R_PTX void mbar_init(uint32_t bar, int arrivals P2R_AND_HERE) {
#ifdef P2R_TWIN
  simt::mbar_init(bar, arrivals, at);
#elif defined(P2R_SM90)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
#else
  __trap();
#endif
}

// Makes initialised barriers visible to TMA; the other threads still need a __syncthreads.
P2R_PTX void mbar_fence_init() {
#ifdef P2R_TWIN
#elif defined(P2R_SM90)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  __trap();
#endif
}

P2R_PTX void mbar_arrive(uint32_t bar P2R_AND_HERE) {
#ifdef P2R_TWIN
  simt::mbar_arrive(bar, 0, at);
#elif defined(P2R_SM90)
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(bar)
               : "memory");
#else
  __trap();
#endif
}

// Arrives, and adds to the bytes that the phase waits for.
P2R_PTX void mbar_arrive_expect_tx(uint32_t bar, int bytes P2R_AND_HERE) {
#ifdef P2R_TWIN
  simt::mbar_arrive(bar, bytes, at);
#elif defined(P2R_SM90)
  asm volatile(
      "{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(
          bar),
      "r"(bytes)
      : "memory");
#else
  __trap();
#endif
}

// Adds to the bytes without arriving.
P2R_PTX void mbar_expect_tx(uint32_t bar, int bytes P2R_AND_HERE) {
#ifdef P2R_TWIN
  simt::mbar_expect(bar, bytes, at);
#elif defined(P2R_SM90)
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
#else
  __trap();
#endif
}

P2R_PTX void mbar_wait(uint32_t bar, int parity P2R_AND_HERE) {
#ifdef P2R_TWIN
  simt::mbar_wait(bar, parity, at);
#elif defined(P2R_SM90)
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(bar),
      "r"(parity)
      : "memory");
#else
  __trap();
#endif
}

// ---- TMA ----
// Orders this thread's ordinary writes to shared memory before TMA stores and wgmma reads of them.
P2R_PTX void fence_proxy_async() {
#ifdef P2R_TWIN
  simt::fence_proxy_async();
#elif defined(P2R_SM90)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  __trap();
#endif
}

// A tile of the map's box at the given coordinates (innermost first) to or from shared memory, of 2
// or 3 dimensions. Outside the tensor, loads give zeros and stores write nothing. The maps are
// __grid_constant__ kernel parameters. Coordinates are written in braces:
// tma_load(dst, map, bar, {x, y}).
template <int Rank>
P2R_PTX void tma_load(uint32_t dst, const TensorMap& map, uint32_t bar,
                      const int (&c)[Rank] P2R_AND_HERE) {
#ifdef P2R_TWIN
  simt::tma_load(dst, map, bar, c, Rank, at);
#elif defined(P2R_SM90)
  static_assert(Rank == 2 || Rank == 3);
  if constexpr (Rank == 2)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4}], [%2];" ::"r"(dst),
        "l"(&map), "r"(bar), "r"(c[0]), "r"(c[1])
        : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(dst),
        "l"(&map), "r"(bar), "r"(c[0]), "r"(c[1]), "r"(c[2])
        : "memory");
#else
  __trap();
#endif
}

template <int Rank>
P2R_PTX void tma_store(const TensorMap& map, uint32_t src, const int (&c)[Rank] P2R_AND_HERE) {
#ifdef P2R_TWIN
  simt::tma_store(map, src, c, Rank, false, at);
#elif defined(P2R_SM90)
  static_assert(Rank == 2 || Rank == 3);
  if constexpr (Rank == 2)
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group "
        "[%0, {%2, %3}], [%1];" ::"l"(&map),
        "r"(src), "r"(c[0]), "r"(c[1])
        : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group "
        "[%0, {%2, %3, %4}], [%1];" ::"l"(&map),
        "r"(src), "r"(c[0]), "r"(c[1]), "r"(c[2])
        : "memory");
#else
  __trap();
#endif
}

// Adds the tile to global memory. The order of additions is not fixed: not for results that must
// be deterministic.
template <int Rank>
P2R_PTX void tma_reduce_add(const TensorMap& map, uint32_t src, const int (&c)[Rank] P2R_AND_HERE) {
#ifdef P2R_TWIN
  simt::tma_store(map, src, c, Rank, true, at);
#elif defined(P2R_SM90)
  static_assert(Rank == 2 || Rank == 3);
  if constexpr (Rank == 2)
    asm volatile(
        "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group "
        "[%0, {%2, %3}], [%1];" ::"l"(&map),
        "r"(src), "r"(c[0]), "r"(c[1])
        : "memory");
  else
    asm volatile(
        "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group "
        "[%0, {%2, %3, %4}], [%1];" ::"l"(&map),
        "r"(src), "r"(c[0]), "r"(c[1]), "r"(c[2])
        : "memory");
#else
  __trap();
#endif
}

// Adds contiguous f32 in shared memory, a multiple of 16 bytes, to global memory, in an order that
// is not fixed.
P2R_PTX void bulk_reduce_add(float* dst, uint32_t src, uint32_t bytes P2R_AND_HERE) {
#ifdef P2R_TWIN
  simt::bulk_reduce_add(dst, src, bytes, at);
#elif defined(P2R_SM90)
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(dst),
      "r"(src), "r"(bytes)
      : "memory");
#else
  __trap();
#endif
}

// Adds two neighbouring f32, aligned to 8 bytes, in global memory, and waits for nothing. Subnormal
// results become 0.
P2R_PTX void red_add2(float* dst, float x, float y) {
#if defined(P2R_TWIN) || !defined(P2R_SM90)
  atomicAdd(dst, x);
  atomicAdd(dst + 1, y);
#else
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(dst), "f"(x), "f"(y) : "memory");
#endif
}

P2R_PTX void tma_commit() {
#ifdef P2R_TWIN
  simt::tma_commit();
#elif defined(P2R_SM90)
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#else
  __trap();
#endif
}

// Returns when all but N of this thread's committed store groups are written to global memory.
template <int N>
P2R_PTX void tma_wait() {
#ifdef P2R_TWIN
  simt::tma_wait(N, false);
#elif defined(P2R_SM90)
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
#else
  __trap();
#endif
}

// Returns when all but N have read shared memory, so that their tiles may be overwritten.
template <int N>
P2R_PTX void tma_wait_read() {
#ifdef P2R_TWIN
  simt::tma_wait(N, true);
#elif defined(P2R_SM90)
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
#else
  __trap();
#endif
}

// Prefetches the descriptor of a map in global or parameter memory.
P2R_PTX void tma_prefetch(const TensorMap& map) {
#ifdef P2R_TWIN
  (void)map;
#elif defined(P2R_SM90)
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#else
  __trap();
#endif
}

// ---- wgmma: D[64][N] (+)= A[64][16] B[16][N], by four warps of which each holds 16 rows ----
// Accumulator i of lane l is row l / 4 + 8 (i / 2 % 2) of its warp's 16 and column
// 8 (i / 4) + 2 (l % 4) + i % 2. A in registers is laid out as in mma_m16n8k16.
//
// Order of use: write registers; wgmma_keep them; wgmma_fence; wgmmas; wgmma_commit; wgmma_wait;
// wgmma_keep. Between fence and wait the registers must not be accessed. Shared memory written by
// threads needs fence_proxy_async by the writers first.

// The matrix descriptor of an operand in shared memory: mn (rows of A, columns of B) by k, K-major
// (k is contiguous) or MN-major. Rows of a swizzled tile are 128, 64 or 32 bytes. The offsets, in
// bytes, from one part of the operand to the next:
//
//                         leading (LBO)                                stride (SBO)
//   no swizzle, either    next 8 of k                                  next 8 of mn
//   swizzled, K-major     not read                                     next 8 of mn
//   swizzled, MN-major    next swizzle row of mn: 64, 32 or 16 of it   next 8 of k
//
// A K-major operand advances by 16 of k, one instruction, by 32 bytes added to the address.
__host__ P2R_PTX uint64_t matrix_desc(uint32_t address, uint32_t leading, uint32_t stride,
                                      Swizzle swizzle) {
  return uint64_t(address >> 4 & 0x3FFF) | uint64_t(leading >> 4 & 0x3FFF) << 16 |
         uint64_t(stride >> 4 & 0x3FFF) << 32 | uint64_t(swizzle) << 62;
}

P2R_PTX void wgmma_fence(P2R_HERE) {
#ifdef P2R_TWIN
  simt::wgmma_fence(at);
#elif defined(P2R_SM90A)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  __trap();
#endif
}

P2R_PTX void wgmma_commit(P2R_HERE) {
#ifdef P2R_TWIN
  simt::wgmma_commit(at);
#elif defined(P2R_SM90A)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  __trap();
#endif
}

// Returns when at most N groups are still in flight.
template <int N>
P2R_PTX void wgmma_wait(P2R_HERE) {
#ifdef P2R_TWIN
  simt::wgmma_wait(N, at);
#elif defined(P2R_SM90A)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#else
  __trap();
#endif
}

// A compiler barrier for these registers, before wgmma_fence and after wgmma_wait: their uses are
// not moved across it.
template <class R, int Count>
P2R_PTX void wgmma_keep(R (&r)[Count]) {
#ifdef P2R_TWIN
  (void)r;
#else
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    if constexpr (std::is_same_v<R, float>)
      asm volatile("" : "+f"(r[i])::"memory");
    else
      asm volatile("" : "+r"(r[i])::"memory");
  }
#endif
}

// setmaxnreg, raises the registers of each thread of a warpgroup; all of its warps call it.
template <int Count>
P2R_PTX void reg_alloc(P2R_HERE) {
#ifdef P2R_TWIN
  static_assert(Count >= 24 && Count <= 256 && Count % 8 == 0);
  simt::set_max_registers(Count, true, at);
#elif defined(P2R_SM90A)
  static_assert(Count >= 24 && Count <= 256 && Count % 8 == 0);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
#else
  __trap();
#endif
}

template <int Count>
P2R_PTX void reg_dealloc(P2R_HERE) {
#ifdef P2R_TWIN
  static_assert(Count >= 24 && Count <= 256 && Count % 8 == 0);
  simt::set_max_registers(Count, false, at);
#elif defined(P2R_SM90A)
  static_assert(Count >= 24 && Count <= 256 && Count % 8 == 0);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
#else
  __trap();
#endif
}

#ifndef P2R_TWIN
namespace detail {

// An asm statement needs its register list as a literal, so each N has one: P2R_D<count> names the
// registers in the text, P2R_O<count> passes them. The other operands follow the <count>
// accumulators; the table below gives their numbers.
// clang-format off
#define P2R_D4 "%0, %1, %2, %3"
#define P2R_D8 P2R_D4 ", %4, %5, %6, %7"
#define P2R_D12 P2R_D8 ", %8, %9, %10, %11"
#define P2R_D16 P2R_D12 ", %12, %13, %14, %15"
#define P2R_D20 P2R_D16 ", %16, %17, %18, %19"
#define P2R_D24 P2R_D20 ", %20, %21, %22, %23"
#define P2R_D28 P2R_D24 ", %24, %25, %26, %27"
#define P2R_D32 P2R_D28 ", %28, %29, %30, %31"
#define P2R_D36 P2R_D32 ", %32, %33, %34, %35"
#define P2R_D40 P2R_D36 ", %36, %37, %38, %39"
#define P2R_D44 P2R_D40 ", %40, %41, %42, %43"
#define P2R_D48 P2R_D44 ", %44, %45, %46, %47"
#define P2R_D52 P2R_D48 ", %48, %49, %50, %51"
#define P2R_D56 P2R_D52 ", %52, %53, %54, %55"
#define P2R_D60 P2R_D56 ", %56, %57, %58, %59"
#define P2R_D64 P2R_D60 ", %60, %61, %62, %63"
#define P2R_D68 P2R_D64 ", %64, %65, %66, %67"
#define P2R_D72 P2R_D68 ", %68, %69, %70, %71"
#define P2R_D76 P2R_D72 ", %72, %73, %74, %75"
#define P2R_D80 P2R_D76 ", %76, %77, %78, %79"
#define P2R_D84 P2R_D80 ", %80, %81, %82, %83"
#define P2R_D88 P2R_D84 ", %84, %85, %86, %87"
#define P2R_D92 P2R_D88 ", %88, %89, %90, %91"
#define P2R_D96 P2R_D92 ", %92, %93, %94, %95"
#define P2R_D100 P2R_D96 ", %96, %97, %98, %99"
#define P2R_D104 P2R_D100 ", %100, %101, %102, %103"
#define P2R_D108 P2R_D104 ", %104, %105, %106, %107"
#define P2R_D112 P2R_D108 ", %108, %109, %110, %111"
#define P2R_D116 P2R_D112 ", %112, %113, %114, %115"
#define P2R_D120 P2R_D116 ", %116, %117, %118, %119"
#define P2R_D124 P2R_D120 ", %120, %121, %122, %123"
#define P2R_D128 P2R_D124 ", %124, %125, %126, %127"
#define P2R_O_AT(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define P2R_O4 P2R_O_AT(0)
#define P2R_O8 P2R_O4, P2R_O_AT(4)
#define P2R_O12 P2R_O8, P2R_O_AT(8)
#define P2R_O16 P2R_O12, P2R_O_AT(12)
#define P2R_O20 P2R_O16, P2R_O_AT(16)
#define P2R_O24 P2R_O20, P2R_O_AT(20)
#define P2R_O28 P2R_O24, P2R_O_AT(24)
#define P2R_O32 P2R_O28, P2R_O_AT(28)
#define P2R_O36 P2R_O32, P2R_O_AT(32)
#define P2R_O40 P2R_O36, P2R_O_AT(36)
#define P2R_O44 P2R_O40, P2R_O_AT(40)
#define P2R_O48 P2R_O44, P2R_O_AT(44)
#define P2R_O52 P2R_O48, P2R_O_AT(48)
#define P2R_O56 P2R_O52, P2R_O_AT(52)
#define P2R_O60 P2R_O56, P2R_O_AT(56)
#define P2R_O64 P2R_O60, P2R_O_AT(60)
#define P2R_O68 P2R_O64, P2R_O_AT(64)
#define P2R_O72 P2R_O68, P2R_O_AT(68)
#define P2R_O76 P2R_O72, P2R_O_AT(72)
#define P2R_O80 P2R_O76, P2R_O_AT(76)
#define P2R_O84 P2R_O80, P2R_O_AT(80)
#define P2R_O88 P2R_O84, P2R_O_AT(84)
#define P2R_O92 P2R_O88, P2R_O_AT(88)
#define P2R_O96 P2R_O92, P2R_O_AT(92)
#define P2R_O100 P2R_O96, P2R_O_AT(96)
#define P2R_O104 P2R_O100, P2R_O_AT(100)
#define P2R_O108 P2R_O104, P2R_O_AT(104)
#define P2R_O112 P2R_O108, P2R_O_AT(108)
#define P2R_O116 P2R_O112, P2R_O_AT(112)
#define P2R_O120 P2R_O116, P2R_O_AT(116)
#define P2R_O124 P2R_O120, P2R_O_AT(120)
#define P2R_O128 P2R_O124, P2R_O_AT(124)
// clang-format on

// Operands x0.. follow the accumulators: descriptors (or A's four registers), the predicate that
// keeps D, and which operands are MN-major.
#define P2R_WGMMA_TEXT(n, count, type, a, b, keep, majors)                          \
  "{\n.reg .pred keep;\nsetp.ne.b32 keep, %" #keep                                  \
  ", 0;\n"                                                                          \
  "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" P2R_D##count \
      "}, " a ", %" #b ", keep, 1, 1, " majors ";\n}"
#define P2R_WGMMA(n, count, x0, x1, x2, x3, x4, x5, x6)                                           \
  template <>                                                                                     \
  struct Wgmma<n> {                                                                               \
    template <bool Bf16, int AMajor, int BMajor>                                                  \
    static P2R_PTX void ss(float (&d)[count], uint64_t a, uint64_t b, int keep) {                 \
      if constexpr (Bf16)                                                                         \
        asm volatile(P2R_WGMMA_TEXT(n, count, "bf16", "%" #x0, x1, x2, "%" #x3 ", %" #x4)         \
                     : P2R_O##count                                                               \
                     : "l"(a), "l"(b), "r"(keep), "n"(AMajor), "n"(BMajor));                      \
      else                                                                                        \
        asm volatile(P2R_WGMMA_TEXT(n, count, "f16", "%" #x0, x1, x2, "%" #x3 ", %" #x4)          \
                     : P2R_O##count                                                               \
                     : "l"(a), "l"(b), "r"(keep), "n"(AMajor), "n"(BMajor));                      \
    }                                                                                             \
    template <bool Bf16, int BMajor>                                                              \
    static P2R_PTX void rs(float (&d)[count], const uint32_t (&a)[4], uint64_t b, int keep) {     \
      if constexpr (Bf16)                                                                         \
        asm volatile(P2R_WGMMA_TEXT(n, count, "bf16", "{%" #x0 ", %" #x1 ", %" #x2 ", %" #x3 "}", \
                                    x4, x5, "%" #x6)                                              \
                     : P2R_O##count                                                               \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep),             \
                       "n"(BMajor));                                                              \
      else                                                                                        \
        asm volatile(P2R_WGMMA_TEXT(n, count, "f16", "{%" #x0 ", %" #x1 ", %" #x2 ", %" #x3 "}",  \
                                    x4, x5, "%" #x6)                                              \
                     : P2R_O##count                                                               \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep),             \
                       "n"(BMajor));                                                              \
    }                                                                                             \
  };

template <int N>
struct Wgmma;
P2R_WGMMA(8, 4, 4, 5, 6, 7, 8, 9, 10)
P2R_WGMMA(16, 8, 8, 9, 10, 11, 12, 13, 14)
P2R_WGMMA(24, 12, 12, 13, 14, 15, 16, 17, 18)
P2R_WGMMA(32, 16, 16, 17, 18, 19, 20, 21, 22)
P2R_WGMMA(40, 20, 20, 21, 22, 23, 24, 25, 26)
P2R_WGMMA(48, 24, 24, 25, 26, 27, 28, 29, 30)
P2R_WGMMA(56, 28, 28, 29, 30, 31, 32, 33, 34)
P2R_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
P2R_WGMMA(72, 36, 36, 37, 38, 39, 40, 41, 42)
P2R_WGMMA(80, 40, 40, 41, 42, 43, 44, 45, 46)
P2R_WGMMA(88, 44, 44, 45, 46, 47, 48, 49, 50)
P2R_WGMMA(96, 48, 48, 49, 50, 51, 52, 53, 54)
P2R_WGMMA(104, 52, 52, 53, 54, 55, 56, 57, 58)
P2R_WGMMA(112, 56, 56, 57, 58, 59, 60, 61, 62)
P2R_WGMMA(120, 60, 60, 61, 62, 63, 64, 65, 66)
P2R_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
P2R_WGMMA(136, 68, 68, 69, 70, 71, 72, 73, 74)
P2R_WGMMA(144, 72, 72, 73, 74, 75, 76, 77, 78)
P2R_WGMMA(152, 76, 76, 77, 78, 79, 80, 81, 82)
P2R_WGMMA(160, 80, 80, 81, 82, 83, 84, 85, 86)
P2R_WGMMA(168, 84, 84, 85, 86, 87, 88, 89, 90)
P2R_WGMMA(176, 88, 88, 89, 90, 91, 92, 93, 94)
P2R_WGMMA(184, 92, 92, 93, 94, 95, 96, 97, 98)
P2R_WGMMA(192, 96, 96, 97, 98, 99, 100, 101, 102)
P2R_WGMMA(200, 100, 100, 101, 102, 103, 104, 105, 106)
P2R_WGMMA(208, 104, 104, 105, 106, 107, 108, 109, 110)
P2R_WGMMA(216, 108, 108, 109, 110, 111, 112, 113, 114)
P2R_WGMMA(224, 112, 112, 113, 114, 115, 116, 117, 118)
P2R_WGMMA(232, 116, 116, 117, 118, 119, 120, 121, 122)
P2R_WGMMA(240, 120, 120, 121, 122, 123, 124, 125, 126)
P2R_WGMMA(248, 124, 124, 125, 126, 127, 128, 129, 130)
P2R_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)

}  // namespace detail
#endif

// A and B from shared memory, by matrix_desc. Without `accumulate`, D is overwritten.
template <class T, int N, bool AMnMajor = false, bool BMnMajor = false>
P2R_PTX void wgmma_ss(float (&d)[N / 2], uint64_t a_desc, uint64_t b_desc,
                      bool accumulate P2R_AND_HERE) {
#ifdef P2R_TWIN
  static_assert(is_half<T>);
  simt::wgmma(d, nullptr, {N, is_bf16<T>, AMnMajor, BMnMajor, accumulate, a_desc, b_desc}, at);
#elif defined(P2R_SM90A)
  static_assert(is_half<T>);
  detail::Wgmma<N>::template ss<is_bf16<T>, AMnMajor, BMnMajor>(d, a_desc, b_desc, accumulate);
#else
  __trap();
#endif
}

// A from registers, which must not be written before the wait.
template <class T, int N, bool BMnMajor = false>
P2R_PTX void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b_desc,
                      bool accumulate P2R_AND_HERE) {
#ifdef P2R_TWIN
  static_assert(is_half<T>);
  simt::wgmma(d, a, {N, is_bf16<T>, false, BMnMajor, accumulate, 0, b_desc}, at);
#elif defined(P2R_SM90A)
  static_assert(is_half<T>);
  detail::Wgmma<N>::template rs<is_bf16<T>, BMnMajor>(d, a, b_desc, accumulate);
#else
  __trap();
#endif
}

}  // namespace p2r::cuda::ptx

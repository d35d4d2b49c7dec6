// CUDA's device functions that kernels call by name: synchronisation, votes, shuffles, atomics,
// bit tricks, rounded arithmetic. Included by simt.h only.
#pragma once
#include <algorithm>

// ---- synchronisation ----
inline void __syncthreads(SIMT_HERE) { simt::sync_threads(at); }
inline int __syncthreads_count(int p, SIMT_HERE) {
  return simt::sync_threads_reduce(p, simt::Reduce::count, at);
}
inline int __syncthreads_and(int p, SIMT_HERE) {
  return simt::sync_threads_reduce(p, simt::Reduce::all, at);
}
inline int __syncthreads_or(int p, SIMT_HERE) {
  return simt::sync_threads_reduce(p, simt::Reduce::any, at);
}
inline void __syncwarp(uint32_t mask = ~0u, SIMT_HERE) { simt::warp_sync(mask, at); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __nanosleep(unsigned) {}
[[noreturn]] inline void __trap(SIMT_HERE) { simt::fail("__trap", at); }

// ---- across the warp ----
inline uint32_t __activemask(SIMT_HERE) { return simt::active_mask(at); }
inline uint32_t __ballot_sync(uint32_t mask, int p, SIMT_HERE) { return simt::ballot(mask, p, at); }
inline int __any_sync(uint32_t mask, int p, SIMT_HERE) { return simt::ballot(mask, p, at) != 0; }
inline int __all_sync(uint32_t mask, int p, SIMT_HERE) { return simt::ballot(mask, p, at) == mask; }
inline uint32_t __reduce_add_sync(uint32_t mask, uint32_t value, SIMT_HERE) {
  return simt::reduce_add(mask, value, at);
}

namespace simt {
template <class T>
uint64_t bits_of(T value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}
}  // namespace simt

template <class T>
uint32_t __match_any_sync(uint32_t mask, T value, SIMT_HERE) {
  return simt::match_any(mask, simt::bits_of(value), at);
}
template <class T>
uint32_t __match_all_sync(uint32_t mask, T value, int* all_equal, SIMT_HERE) {
  return simt::match_all(mask, simt::bits_of(value), all_equal, at);
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, SIMT_HERE) {
  return simt::shuffle(simt::Shuffle::index, mask, value, source, width, at);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, SIMT_HERE) {
  return simt::shuffle(simt::Shuffle::up, mask, value, int(delta), width, at);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, SIMT_HERE) {
  return simt::shuffle(simt::Shuffle::down, mask, value, int(delta), width, at);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32, SIMT_HERE) {
  return simt::shuffle(simt::Shuffle::bfly, mask, value, lanes, width, at);
}

// ---- atomics: relaxed, as on the device, and atomic between the twin's OS threads too ----
namespace simt {
template <size_t Bytes>
using word_t =
    std::conditional_t<Bytes == 2, uint16_t, std::conditional_t<Bytes == 4, uint32_t, uint64_t>>;
template <class T>
struct identity {
  using type = T;
};
// Keeps an argument out of template deduction: atomicAdd(&float, 1) has T = float.
template <class T>
using plain = typename identity<T>::type;

template <class T, class F>
T read_modify_write(T* p, F next) {
  using Word = word_t<sizeof(T)>;
  static_assert(sizeof(T) == sizeof(Word));
  Word* word = reinterpret_cast<Word*>(p);
  Word before = __atomic_load_n(word, __ATOMIC_RELAXED), after;
  T old_value;
  do {
    memcpy(static_cast<void*>(&old_value), &before, sizeof(T));
    const T new_value = next(old_value);
    memcpy(&after, &new_value, sizeof(T));
  } while (!__atomic_compare_exchange_n(word, &before, after, false, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED));
  return old_value;
}
}  // namespace simt

template <class T>
T atomicAdd(T* p, simt::plain<T> v) {
  return simt::read_modify_write(p, [v](T old) { return T(old + v); });
}
template <class T>
T atomicSub(T* p, simt::plain<T> v) {
  return simt::read_modify_write(p, [v](T old) { return T(old - v); });
}
template <class T>
T atomicMax(T* p, simt::plain<T> v) {
  return simt::read_modify_write(p, [v](T old) { return old > v ? old : v; });
}
template <class T>
T atomicMin(T* p, simt::plain<T> v) {
  return simt::read_modify_write(p, [v](T old) { return old < v ? old : v; });
}
template <class T>
T atomicAnd(T* p, simt::plain<T> v) {
  return simt::read_modify_write(p, [v](T old) { return T(old & v); });
}
template <class T>
T atomicOr(T* p, simt::plain<T> v) {
  return simt::read_modify_write(p, [v](T old) { return T(old | v); });
}
template <class T>
T atomicXor(T* p, simt::plain<T> v) {
  return simt::read_modify_write(p, [v](T old) { return T(old ^ v); });
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  return simt::read_modify_write(p, [limit](unsigned old) { return old >= limit ? 0 : old + 1; });
}
inline unsigned atomicDec(unsigned* p, unsigned limit) {
  return simt::read_modify_write(
      p, [limit](unsigned old) { return old == 0 || old > limit ? limit : old - 1; });
}
template <class T>
T atomicExch(T* p, simt::plain<T> v) {
  return simt::read_modify_write(p, [v](T) { return v; });
}
template <class T>
T atomicCAS(T* p, simt::plain<T> expected, simt::plain<T> v) {
  return simt::read_modify_write(p, [=](T old) { return old == expected ? v : old; });
}

// ---- memory with cache hints ----
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldca(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, simt::plain<T> v) {
  *p = v;
}
template <class T>
void __stcg(T* p, simt::plain<T> v) {
  *p = v;
}

// ---- bits ----
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1u) << (31 - i);
  return y;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __mulhi(int a, int b) { return int(int64_t(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)(a)*b >> 64);
}
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned shift) {
  return unsigned((uint64_t(hi) << 32 | lo) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned shift) {
  return unsigned((uint64_t(hi) << 32 | lo) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> (4 * i);
    unsigned byte = unsigned(bytes >> (8 * (pick & 7))) & 0xFFu;
    if (pick & 8) byte = byte & 0x80u ? 0xFFu : 0u;
    out |= byte << (8 * i);
  }
  return out;
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += int(int8_t(a >> (8 * i))) * int(int8_t(b >> (8 * i)));
  return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; ++i) c += (a >> (8 * i) & 0xFFu) * (b >> (8 * i) & 0xFFu);
  return c;
}

namespace simt {
template <class To, class From>
To bit_copy(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}
}  // namespace simt

inline float __int_as_float(int x) { return simt::bit_copy<float>(x); }
inline int __float_as_int(float x) { return simt::bit_copy<int>(x); }
inline float __uint_as_float(unsigned x) { return simt::bit_copy<float>(x); }
inline unsigned __float_as_uint(float x) { return simt::bit_copy<unsigned>(x); }
inline double __longlong_as_double(long long x) { return simt::bit_copy<double>(x); }
inline long long __double_as_longlong(double x) { return simt::bit_copy<long long>(x); }

// ---- conversions; out of range saturates and NaN gives 0, as on the device ----
namespace simt {
template <class To, class From>
To saturate(From x) {
  if (x != x) return 0;
  const From low = From(std::numeric_limits<To>::min()),
             high = From(std::numeric_limits<To>::max());
  if (x <= low) return std::numeric_limits<To>::min();
  if (x >= high) return std::numeric_limits<To>::max();
  return To(x);
}
}  // namespace simt

inline int __float2int_rn(float x) { return simt::saturate<int>(nearbyintf(x)); }
inline int __float2int_rz(float x) { return simt::saturate<int>(truncf(x)); }
inline int __float2int_rd(float x) { return simt::saturate<int>(floorf(x)); }
inline int __float2int_ru(float x) { return simt::saturate<int>(ceilf(x)); }
inline unsigned __float2uint_rn(float x) { return simt::saturate<unsigned>(nearbyintf(x)); }
inline unsigned __float2uint_rz(float x) { return simt::saturate<unsigned>(truncf(x)); }
inline int __double2int_rn(double x) { return simt::saturate<int>(nearbyint(x)); }
inline int __double2int_rz(double x) { return simt::saturate<int>(trunc(x)); }
inline long long __double2ll_rn(double x) { return simt::saturate<long long>(nearbyint(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline float __double2float_rn(double x) { return float(x); }

// ---- arithmetic. The _rn forms are never contracted into an FMA; the twin is built so that
// nothing is (-ffp-contract=off). ----
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __frsqrt_rn(float x) { return float(1.0 / sqrt(double(x))); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline double __dsqrt_rn(double x) { return sqrt(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

// CUDA has min and max for every mix of arithmetic types.
template <class A, class B>
constexpr std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>,
                           std::common_type_t<A, B>>
min(A a, B b) {
  using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<C>) return std::fmin(C(a), C(b));
  return C(b) < C(a) ? C(b) : C(a);
}
template <class A, class B>
constexpr std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>,
                           std::common_type_t<A, B>>
max(A a, B b) {
  using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<C>) return std::fmax(C(a), C(b));
  return C(a) < C(b) ? C(b) : C(a);
}

// glibc declares some of these, so a call would compile here and fail to link, or mean another
// function. Kernels use ptx::ex2, ptx::lg2 and their like.
#define __expf TWIN_ERROR_use_ptx_ex2
#define __exp10f TWIN_ERROR_use_ptx_ex2
#define __logf TWIN_ERROR_use_ptx_lg2
#define __log2f TWIN_ERROR_use_ptx_lg2
#define __log10f TWIN_ERROR_use_ptx_lg2
#define __powf TWIN_ERROR_use_ptx_ex2_and_lg2
#define __sinf TWIN_ERROR_use_sinf
#define __cosf TWIN_ERROR_use_cosf
#define __sincosf TWIN_ERROR_use_sincosf
#define __tanf TWIN_ERROR_use_tanf

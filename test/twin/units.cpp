// Tests of the runtime: what CUDA allows must pass under every schedule, what it forbids must be
// reported.
#include <cmath>

#include "cuda/attention/wgmma.cuh"
#include "ops/kernel_choice.h"
#include "test/twin/harness.h"

HARNESS_SANITIZER_OPTIONS

namespace {

using namespace p2r::cuda;
using harness::small_value;
using bf16 = __nv_bfloat16;

int passed = 0, failed = 0;
alignas(1024) int out[4096];

void report(bool good, const char* name, const std::string& detail) {
  ++(good ? passed : failed);
  if (!good) printf("FAIL %s: %s\n", name, detail.c_str());
}

// `want` null: the work has to succeed under every schedule; else each schedule's error has to
// contain that text.
void expect(const char* name, const char* want, bool (*work)()) {
  std::string problem;
  for (const auto& schedule : harness::all_schedules()) {
    const std::string said = harness::outcome([&] {
      harness::apply(schedule);
      return work();
    });
    if (want ? said.find(want) == std::string::npos : said != "ok")
      problem += harness::name(schedule) + " says \"" + said.substr(0, 200) + "\" ";
  }
  report(problem.empty(), name, problem);
}

template <class K, class... A>
bool run(K kernel, int threads, A... args) {
  launch(kernel, 1, unsigned(threads), 8192, nullptr, args...);
  return true;
}

// ---- barriers ----
__global__ void early_exit(int* o) {
  if (threadIdx.x >= 64) return;
  __syncthreads();
  o[threadIdx.x] = 1;
}
__global__ void count_threads(int* o) { atomicAdd(o, 1); }
__global__ void producer_consumer(int* o) {
  SMEM_ARRAY(int, s, 32);
  if (threadIdx.x < 32) {
    s[threadIdx.x] = 7 + threadIdx.x;
    ptx::bar_arrive(1, 64);
  } else {
    ptx::bar_sync(1, 64);
    o[threadIdx.x - 32] = s[threadIdx.x - 32];
  }
}
__global__ void counts_differ(int*) {
  if (threadIdx.x < 64) ptx::bar_sync(1, threadIdx.x < 32 ? 64 : 96);
}
__global__ void count_odd(int*) { ptx::bar_sync(1, 40); }
__global__ void barrier_id(int*) { ptx::bar_sync(16, 64); }
__global__ void two_lines(int* o) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  o[0] = 1;
}
__global__ void one_missing(int*) {
  if (threadIdx.x < 32) ptx::bar_sync(3, 64);
}
__global__ void reductions(int* o) {
  const int t = threadIdx.x;
  const int count = __syncthreads_count(t % 3 == 0), all = __syncthreads_and(t < 64);
  const int any = __syncthreads_or(t == 63), none = __syncthreads_or(0);
  o[t] = count * 1000 + all * 100 + any * 10 + none;
}

// ---- warps ----
__global__ void disjoint_masks(int* o) {
  const int t = threadIdx.x;
  o[t] = t < 16 ? __shfl_xor_sync(0xFFFFu, t, 1) : __shfl_down_sync(0xFFFF0000u, t, 1);
}
__global__ void different_collectives(int* o) {
  o[threadIdx.x] = threadIdx.x < 16 ? __shfl_xor_sync(~0u, 1, 1) : int(__ballot_sync(~0u, 1));
}
__global__ void not_in_mask(int* o) { o[threadIdx.x] = __shfl_sync(1u, 3, 0); }
__global__ void exited_lanes(int* o) {
  if (threadIdx.x < 31) return;
  o[0] = __shfl_sync(~0u, 3, 0);
}
__global__ void odd_width(int* o) { o[threadIdx.x] = __shfl_sync(~0u, 1, 0, 12); }
__global__ void lanes_missing(int* o) {
  if (threadIdx.x & 1)
    o[threadIdx.x] = __shfl_sync(~0u, 3, 0);
  else
    __syncthreads();
}
__global__ void votes(int* o) {
  const int t = threadIdx.x;
  int equal = 0;
  const unsigned ballot = __ballot_sync(~0u, t % 3 == 0), peers = __match_any_sync(~0u, t % 4);
  const unsigned same = __match_all_sync(~0u, 5, &equal);
  const double wide = __shfl_up_sync(~0u, double(t), 2, 16);
  o[t] = ballot == 0x49249249u && peers == 0x11111111u << (t % 4) && same == ~0u && equal &&
         wide == (t % 16 < 2 ? t : t - 2) && __any_sync(~0u, t == 9) && !__all_sync(~0u, t == 9) &&
         __reduce_add_sync(~0u, unsigned(t)) == 496;
}

// ---- shared memory and copies ----
__global__ void ldmatrix_outside(int*) {
  SMEM_DYN(s);
  uint32_t r[4];
  ptx::ldmatrix_x4(r, ptx::smem_u32(s) + 8192);
}
__global__ void ldmatrix_misaligned(int*) {
  SMEM_DYN(s);
  uint32_t r[4];
  ptx::ldmatrix_x4(r, ptx::smem_u32(s) + 8);
}
__global__ void not_shared(int* o) { o[0] = int(ptx::smem_u32(o)); }
__global__ void copy_not_waited(int* o) {
  SMEM_DYN(s);
  ptx::cp_async16(ptx::smem_u32(s), o);
  ptx::cp_async_commit();
}
__global__ void copy_misaligned(int* o) {
  SMEM_DYN(s);
  ptx::cp_async16(ptx::smem_u32(s), o + 1);
}
__global__ void copy_and_fill(int* o) {
  SMEM_DYN(s);
  ptx::cp_async16(ptx::smem_u32(s), o);
  ptx::cp_async16(ptx::smem_u32(s) + 16, o, false);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  const int* words = reinterpret_cast<int*>(s);
  o[8] = words[1] == 5 && words[5] == 0;
}
__global__ void copy_to_misaligned(int* o) {
  SMEM_DYN(s);
  ptx::cp_async16(ptx::smem_u32(s) + 8, o);
}
__global__ void load_vector(const char* from, int* o) {
  o[0] = int(reinterpret_cast<const uint4*>(from)->x);
}
__global__ void store_vector(float* to) { *reinterpret_cast<float2*>(to) = make_float2(1, 2); }
template <int Bytes>
__global__ void static_array(int* o) {
  SMEM_ARRAY(int, s, Bytes / 4);
  s[threadIdx.x] = 1;
  o[threadIdx.x] = s[threadIdx.x];
}
struct Guard {
  int* alive;
  explicit Guard(int* a) : alive(a) { atomicAdd(alive, 1); }
  ~Guard() { atomicSub(alive, 1); }
};
__global__ void guarded_deadlock(int* alive) {
  Guard guard(alive);
  if (threadIdx.x < 32) __syncthreads();
  ptx::bar_sync(1, 64);
}

// ---- mbarriers and TMA ----
__global__ void mbar_uninitialised(int*) {
  SMEM_ARRAY(uint64_t, bar, 1);
  ptx::mbar_wait(ptx::smem_u32(bar), 0);
}
__global__ void mbar_too_many(int*) {
  SMEM_ARRAY(uint64_t, bar, 1);
  const uint32_t b = ptx::smem_u32(bar);
  ptx::mbar_init(b, 1);
  ptx::mbar_arrive_expect_tx(b, 16);
  ptx::mbar_arrive(b);
}
// Two phases of a barrier of one arrival, with a wait for the first or none.
__global__ void mbar_two_phases(bool waits) {
  SMEM_ARRAY(uint64_t, bar, 1);
  const uint32_t b = ptx::smem_u32(bar);
  ptx::mbar_init(b, 1);
  ptx::mbar_arrive(b);
  if (waits) ptx::mbar_wait(b, 0);
  ptx::mbar_arrive(b);
}
__global__ void mbar_bytes(int expected) {
  SMEM_ARRAY(uint64_t, bar, 1);
  const uint32_t b = ptx::smem_u32(bar);
  ptx::mbar_init(b, 1);
  ptx::mbar_expect_tx(b, expected / 2);
  ptx::mbar_expect_tx(b, expected - expected / 2);
}
__global__ void mbar_count(int arrivals) {
  SMEM_ARRAY(uint64_t, bar, 1);
  ptx::mbar_init(ptx::smem_u32(bar), arrivals);
}

// Of three warpgroups with 168 registers a thread, the last gives some to the others.
template <int Given, int Taken>
__global__ void move_registers(int* o) {
  if (threadIdx.x >= 256)
    ptx::reg_dealloc<Given>();
  else
    ptx::reg_alloc<Taken>();
  o[threadIdx.x] = 1;
}
__global__ void registers_by_one_warp(int*) {
  if (threadIdx.x < 32) ptx::reg_dealloc<40>();
}

template <int Rank>
__global__ void load_tile(const __grid_constant__ TensorMap map, int bytes, int c0, int c1,
                          char* o) {
  SMEM_DYN(s);
  SMEM_ARRAY(uint64_t, bar, 1);
  const uint32_t b = ptx::smem_u32(bar);
  if (threadIdx.x == 0) {
    ptx::mbar_init(b, 1);
    ptx::mbar_fence_init();
    ptx::mbar_arrive_expect_tx(b, bytes);
    int c[Rank] = {c0};
    for (int i = 1; i < Rank; ++i) c[i] = c1;
    ptx::tma_load(ptx::smem_u32(s), map, b, c);
  }
  __syncthreads();
  ptx::mbar_wait(b, 0);
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) o[i] = char(s[i]);
}

// Loads one box that overhangs the tensor on both sides and compares with the definition.
template <int Rank, Swizzle Mode, int Inner>
bool tma_matches() {
  std::array<uint64_t, Rank> dims{};
  std::array<uint64_t, Rank - 1> strides{};
  std::array<uint32_t, Rank> box{};
  dims[0] = Inner + 3;
  box[0] = Inner;
  uint64_t pitch = (dims[0] * 2 + 15) / 16 * 16, elements = Inner;
  for (size_t i = 1; i < Rank; ++i) {
    strides[i - 1] = pitch;
    dims[i] = 4;
    box[i] = Rank == 2 ? 8 : 3;
    pitch *= dims[i];
    elements *= box[i];
  }
  harness::Buffer<uint16_t> x(pitch / 2);
  harness::Buffer<char> got(elements * 2);
  for (size_t i = 0; i < x.size(); ++i) x[i] = uint16_t(i + 1);
  const auto map =
      make_tensor_map<__half, Rank>(reinterpret_cast<__half*>(x.get()), dims, strides, box, Mode);
  const int c0 = -2, c1 = Rank == 2 ? -1 : 2;
  launch(load_tile<Rank>, 1, 32, 8192, nullptr, map, int(elements * 2), c0, c1, got.get());
  const unsigned mask = Mode == Swizzle::b128 ? 7 : Mode == Swizzle::b64 ? 3 : Mode == Swizzle::b32;
  for (uint64_t e = 0; e < elements; ++e) {
    uint64_t rest = e / Inner, at = 0;
    const int64_t first = c0 + int64_t(e % Inner);
    bool inside = first >= 0 && first < int64_t(dims[0]);
    for (size_t i = 1; i < Rank; ++i) {
      const int64_t c = c1 + int64_t(rest % box[i]);
      rest /= box[i];
      inside = inside && c >= 0 && c < int64_t(dims[i]);
      at += uint64_t(c) * strides[i - 1];
    }
    const uint64_t byte = e * 2, chunk = (byte / 16) ^ (byte / 128 & mask);
    uint16_t value;
    memcpy(&value, got.get() + chunk * 16 + byte % 16, 2);
    if (value != (inside ? x[at / 2 + uint64_t(first)] : 0)) return false;
  }
  return true;
}

// ---- mma against CuTe's published thread-value layouts ----
// A ((4,8),(2,2,2)):((32,1),(16,8,128)), B ((4,8),(2,2)):((16,1),(8,64)),
// C ((4,8),(2,2)):((32,1),(16,8)), over column-major m + 16 k, n + 8 k, m + 16 n.
__global__ void mma_layout(int* errors) {
  const int t = threadIdx.x;
  for (int half = 0; half < 2; ++half) {
    uint32_t a[4], b[2];
    float d[4] = {};
    for (int v = 0; v < 8; v += 2) {
      const int i = t % 4 * 32 + t / 4 + (v >> 1 & 1) * 8 + (v >> 2) * 128;
      const auto value = [](int at) { return float(at % 16 * 16 + at / 16); };
      a[v / 2] = ptx::pack2<bf16>(value(i), value(i + 16));
    }
    for (int v = 0; v < 4; v += 2) {
      const int i = t % 4 * 16 + t / 4 + (v >> 1) * 64;
      const auto one = [&](int at) { return at / 8 == at % 8 + 8 * half ? 1.f : 0.f; };
      b[v / 2] = ptx::pack2<bf16>(one(i), one(i + 8));
    }
    ptx::mma_m16n8k16<bf16>(d, a, b);
    for (int v = 0; v < 4; ++v) {
      const int i = t % 4 * 32 + t / 4 + (v & 1) * 16 + (v >> 1) * 8, m = i % 16, n = i / 16;
      if (d[v] != float(m * 16 + n + 8 * half)) atomicAdd(errors, 1);
    }
  }
}

// ---- wgmma against a plain loop ----
// Stores element (mn, k) of an operand at its place in a tile of the given swizzle and major:
// K-major rows of `span` elements; MN-major columns of tiles [k 16][span], 16 * span * 2 bytes
// each.
template <class T>
__device__ void place(T* base, int mn, int k, bool mn_major, int span, T value) {
  uint32_t byte;
  if (mn_major)
    byte = uint32_t(mn / span * 16 * span * 2 + k * span * 2 + mn % span * 2);
  else
    byte = uint32_t(mn * span * 2 + k * 2);
  const uint32_t mask = span == 64 ? 7 : span == 32 ? 3 : span == 16 ? 1 : 0;
  byte ^= (byte / 128 & mask) * 16;
  base[byte / 2] = value;
}

template <class T, int N, bool AFromRegisters, bool BMajor, Swizzle Mode>
__global__ void wgmma_case(float* o) {
  constexpr int span = Mode == Swizzle::b128 ? 64 : Mode == Swizzle::b64 ? 32 : 16;
  SMEM_DYN(bytes);
  T *a = reinterpret_cast<T*>(bytes), *b = a + 64 * 64;
  const int t = threadIdx.x;
  for (int i = t; i < 64 * 16; i += 128)
    place(a, i / 16, i % 16, false, span, T(small_value(uint32_t(i))));
  for (int i = t; i < N * 16; i += 128)
    place(b, i / 16, i % 16, BMajor, span, T(small_value(uint32_t(i) + 5)));
  ptx::fence_proxy_async();
  __syncthreads();
  const uint64_t da = ptx::matrix_desc(ptx::smem_u32(a), 0, 8 * span * 2, Mode);
  const uint64_t db = BMajor ? ptx::matrix_desc(ptx::smem_u32(b), 16 * span * 2, 8 * span * 2, Mode)
                             : ptx::matrix_desc(ptx::smem_u32(b), 0, 8 * span * 2, Mode);
  float d[N / 2];
  uint32_t r[4];
  for (int i = 0; i < N / 2; ++i) d[i] = 1.f;
  for (int i = 0; i < 4; ++i) {
    const int row = t / 32 * 16 + t % 32 / 4 + 8 * (i & 1), k = t % 4 * 2 + 8 * (i >> 1);
    r[i] =
        ptx::pack2<T>(small_value(uint32_t(row * 16 + k)), small_value(uint32_t(row * 16 + k + 1)));
  }
  ptx::wgmma_fence();
  for (int repeat = 0; repeat < 2; ++repeat)
    if constexpr (AFromRegisters)
      ptx::wgmma_rs<T, N, BMajor>(d, r, db, true);
    else
      ptx::wgmma_ss<T, N, false, BMajor>(d, da, db, true);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) {
    const int row = t / 32 * 16 + t % 32 / 4 + 8 * (i / 2 % 2), col = i / 4 * 8 + t % 4 * 2 + i % 2;
    o[row * N + col] = d[i];
  }
}

template <class T, int N, bool AFromRegisters, bool BMajor, Swizzle Mode>
bool wgmma_matches() {
  std::vector<float> got(64 * N, NAN);
  launch(wgmma_case<T, N, AFromRegisters, BMajor, Mode>, 1, 128, (64 * 64 + N * 64) * 2, nullptr,
         got.data());
  for (int m = 0; m < 64; ++m)
    for (int n = 0; n < N; ++n) {
      float want = 1;
      for (int k = 0; k < 16; ++k)
        want += 2 * small_value(uint32_t(m * 16 + k)) * small_value(uint32_t(n * 16 + k) + 5);
      if (got[size_t(m * N + n)] != want) return false;
    }
  return true;
}

enum class Misuse { no_fence, unwaited, a_changed, accumulator_changed, no_proxy_fence };
template <Misuse M>
__global__ void wgmma_misuse(int* o) {
  SMEM_DYN(s);
  for (int i = threadIdx.x; i < 2048; i += 128) reinterpret_cast<int*>(s)[i] = 0;
  if (M != Misuse::no_proxy_fence) ptx::fence_proxy_async();
  __syncthreads();
  const uint64_t desc = ptx::matrix_desc(ptx::smem_u32(s), 0, 1024, Swizzle::b128);
  float d[4] = {};
  uint32_t a[4] = {};
  if (M != Misuse::no_fence) ptx::wgmma_fence();
  ptx::wgmma_rs<bf16, 8>(d, a, desc, true);
  if (M == Misuse::a_changed) a[1] = 1;
  if (M == Misuse::accumulator_changed) d[1] = 1;
  ptx::wgmma_commit();
  if (M != Misuse::unwaited) ptx::wgmma_wait<0>();
  o[threadIdx.x] = int(d[0]);
}

// A product of zeros whose B begins `shift` bytes into the pattern, with this stride and these
// further bits of the descriptor.
template <bool BMnMajor>
__global__ void wgmma_placed(int shift, int stride, uint64_t bits) {
  SMEM_DYN(s);
  for (int i = threadIdx.x; i < 2048; i += 128) reinterpret_cast<int*>(s)[i] = 0;
  ptx::fence_proxy_async();
  __syncthreads();
  float d[8];
  uint32_t a[4] = {};
  ptx::wgmma_fence();
  ptx::wgmma_rs<bf16, 16, BMnMajor>(
      d, a,
      ptx::matrix_desc(ptx::smem_u32(s) + uint32_t(shift), 0, uint32_t(stride), Swizzle::b128) |
          bits,
      false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
}

__global__ void intrinsics(int* o) {
  bool good = __popc(0xF0F0u) == 8 && __clz(1) == 31 && __ffs(8) == 4 && __brev(1u) == 0x80000000u;
  good = good && __umulhi(0x80000000u, 6u) == 3 && __dp4a(0x01020304, 0x01010101, 5) == 15;
  good = good && __funnelshift_l(0x80000000u, 1u, 1) == 3 &&
         __byte_perm(0x33221100, 0x77665544, 0x5410) == 0x55441100;
  good = good && __float2int_rn(2.5f) == 2 && __float2int_rn(NAN) == 0 &&
         __float2int_rz(1e20f) == 2147483647;
  good = good && max(1, 2u) == 2u && min(1.5f, 2) == 1.5f && __fmaf_rn(2, 3, 4) == 10;
  float f = 1;
  double g = 1;
  unsigned u = 3;
  good = good && atomicAdd(&f, 2) == 1 && f == 3 && atomicAdd(&g, 2) == 1 && g == 3;
  good =
      good && atomicOr(&u, 4u) == 3 && atomicAnd(&u, 6u) == 7 && atomicInc(&u, 6u) == 6 && u == 0;
  good = good && atomicCAS(&u, 0u, 9u) == 0 && u == 9;
  // 1.5 is 0x3E00 in f16, -2 is 0xC000.
  o[0] = good && ptx::pack2<__half>(1.5f, -2.f) == 0xC0003E00u && ptx::ex2(3.f) == 8.f;
}

// ---- choices of attention's launchers ----
// cuSeqlens of sequences of these lengths, `count` times.
p2r::Ints packed(const std::vector<int64_t>& lengths, int64_t count = 1) {
  p2r::Ints cu{0};
  for (int64_t i = 0; i < count; ++i)
    for (const int64_t n : lengths) cu.push_back(cu.back() + n);
  return cu;
}

// The default is an H200 and a vision tower's 16 heads.
bool small_tiles(const p2r::Ints& cu_seqlens, int64_t heads = 16, int multiprocessors = 132) {
  return attention_wgmma::prefers_small_tiles(cu_seqlens, 128, 192, heads, multiprocessors);
}

std::string default_kernel(const char* capability, const p2r::Ints& cu_seqlens,
                           p2r::DType dtype = p2r::DType::bf16, int64_t head_dim = 80) {
  p2r::DeviceInfo device;
  device.backend = "cuda";
  device.capability = capability;
  for (const p2r::KernelChoice& c : p2r::kernel_choices("attention", device))
    if (c.supports(dtype, head_dim) && c.suits(cu_seqlens)) return c.name;
  return "";
}

}  // namespace

int main() {
  const char* ok = nullptr;
  const auto holds = [](const char* name, bool held) { report(held, name, "does not hold"); };
  // 8192 tokens: 5.2 rounds of 192 queries take 6, 7.8 of 128 take 8.
  const auto rounds_of = [](int64_t step) {
    return attention_wgmma::scheduled_work(packed({8192}), step, 16, 132) / double(step * 8192);
  };
  holds("rounds of tiles of 192", std::abs(rounds_of(192) - 6) < 1e-9);
  holds("rounds of tiles of 128", std::abs(rounds_of(128) - 8) < 1e-9);
  holds("small tiles for a better last round", small_tiles(packed({8192})));
  holds("large tiles where rounds are as good", !small_tiles(packed({8836})) &&
                                                    !small_tiles(packed({15376})) &&
                                                    !small_tiles(packed({62500})));
  holds("large tiles where they are full", !small_tiles(packed({192}, 1000)));
  holds("small tiles where large ones would be padding", small_tiles(packed({128}, 1000)));
  holds("tiles by the number of multiprocessors",
        !small_tiles(packed({192}), 1, 1) && small_tiles(packed({192}), 1, 2));
  holds("no tiles", !small_tiles(packed({0}, 3)) && !small_tiles(packed({})));
  holds("wgmma for long sequences", default_kernel("9.0", packed({8192})) == "wgmma");
  holds("mma for windows of 64 tokens", default_kernel("9.0", packed({64}, 128)) == "mma");
  holds("wgmma for windows above 64 tokens", default_kernel("9.0", packed({65}, 128)) == "wgmma");
  holds("wgmma for windows beside a long sequence",
        default_kernel("9.0", packed({64, 64, 4096})) == "wgmma");
  holds("mma for windows and their ragged rests",
        default_kernel("9.0", packed({64, 64, 100, 16})) == "mma");
  holds("mma where there is no wgmma", default_kernel("8.0", packed({8192})) == "mma");
  holds("plain for f32", default_kernel("9.0", packed({64}), p2r::DType::f32) == "plain");
  expect("exited threads do not count for a barrier", ok, [] { return run(early_exit, 128, out); });
  expect("named barrier with arrive", ok,
         [] { return run(producer_consumer, 64, out) && out[0] == 7 && out[31] == 38; });
  expect("barrier counts differ", "different counts", [] { return run(counts_differ, 96, out); });
  expect("barrier count not whole warps", "multiple of 32", [] { return run(count_odd, 64, out); });
  expect("barrier id", "not in 0..15", [] { return run(barrier_id, 64, out); });
  expect("__syncthreads on two lines", "divergent", [] { return run(two_lines, 64, out); });
  expect("a warp never arrives", "DEADLOCK", [] { return run(one_missing, 64, out); });
  expect("__syncthreads_count, _and, _or", ok,
         [] { return run(reductions, 64, out) && out[0] == 22110 && out[63] == 22110; });
  expect("disjoint masks", ok,
         [] { return run(disjoint_masks, 32, out) && out[0] == 1 && out[16] == 17; });
  expect("different collectives of one mask", "different collectives",
         [] { return run(different_collectives, 32, out); });
  expect("a lane outside its mask", "not in its own mask",
         [] { return run(not_in_mask, 32, out); });
  expect("exited lanes in a mask", "exited", [] { return run(exited_lanes, 32, out); });
  expect("shuffle width", "power of two", [] { return run(odd_width, 32, out); });
  expect("lanes that never shuffle", "DEADLOCK", [] { return run(lanes_missing, 32, out); });
  expect("votes and matches", ok,
         [] { return run(votes, 32, out) && out[0] && out[31] && out[17]; });
  expect("ldmatrix out of bounds", "out of bounds", [] { return run(ldmatrix_outside, 32, out); });
  expect("ldmatrix misaligned", "16-byte aligned",
         [] { return run(ldmatrix_misaligned, 32, out); });
  expect("smem_u32 of global memory", "not a pointer into shared",
         [] { return run(not_shared, 1, out); });
  expect("cp.async never waited for", "not waited for",
         [] { return run(copy_not_waited, 1, out); });
  expect("cp.async misaligned", "misaligned", [] { return run(copy_misaligned, 1, out); });
  expect("cp.async to a misaligned place", "misaligned",
         [] { return run(copy_to_misaligned, 1, out); });
  expect("a load of 16 bytes from a multiple of 8", "not 16-byte aligned",
         [] { return run(load_vector, 1, reinterpret_cast<const char*>(out + 2), out); });
  expect("a load of 16 bytes from a multiple of 16", ok,
         [] { return run(load_vector, 1, reinterpret_cast<const char*>(out + 4), out); });
  expect("a store of 8 bytes to a multiple of 4", "not 8-byte aligned",
         [] { return run(store_vector, 1, reinterpret_cast<float*>(out + 1)); });
  expect("static and dynamic shared memory up to 48 KB", ok, [] {
    launch(static_array<16 * 1024>, 1, 32, 32 * 1024, nullptr, out);
    return out[31] == 1;
  });
  expect("static and dynamic shared memory above 48 KB, without the opt-in", "without the opt-in",
         [] {
           launch(static_array<16 * 1024 + 16>, 1, 32, 32 * 1024, nullptr, out);
           return true;
         });
  expect("static and dynamic shared memory with the opt-in", ok, [] {
    launch(static_array<128>, 1, 32, 226 * 1024, nullptr, out);
    return out[31] == 1;
  });
  expect("static and dynamic shared memory above what a block may have", "at most 232448", [] {
    launch(static_array<1040>, 1, 32, 226 * 1024, nullptr, out);
    return true;
  });
  expect("static shared memory above 48 KB", "static", [] {
    launch(static_array<48 * 1024 + 16>, 1, 32, 33 * 1024, nullptr, out);
    return true;
  });
  expect("cp.async copies and fills", ok, [] {
    out[1] = 5;
    return run(copy_and_fill, 1, out) && out[8] == 1;
  });
  expect("an abandoned launch unwinds its threads", ok, [] {
    out[0] = 0;
    try {
      run(guarded_deadlock, 96, out);
    } catch (const simt::Error& e) {
      return out[0] == 0 && run(early_exit, 128, out);
    }
    return false;
  });
  expect("mbarrier not initialised", "never initialised",
         [] { return run(mbar_uninitialised, 1, out); });
  expect("mbarrier arrivals", "more arrivals", [] { return run(mbar_too_many, 1, out); });
  expect("mbarrier phases with a wait between them", ok,
         [] { return run(mbar_two_phases, 1, true); });
  expect("mbarrier phases with no wait between them", "before any wait",
         [] { return run(mbar_two_phases, 1, false); });
  expect("mbarrier bytes up to 2^20 - 1", ok, [] { return run(mbar_bytes, 1, (1 << 20) - 1); });
  expect("mbarrier bytes above 2^20 - 1", "more than it can count",
         [] { return run(mbar_bytes, 1, 1 << 20); });
  expect("mbarrier counts above 2^20 - 1", "with a count of",
         [] { return run(mbar_count, 1, 1 << 20); });
  expect("registers moved between warpgroups", ok,
         [] { return run(move_registers<40, 232>, 384, out) && out[0] && out[383]; });
  expect("more registers taken than given", "setmaxnreg 240",
         [] { return run(move_registers<40, 240>, 384, out); });
  expect("registers taken by setmaxnreg.dec", "of a warp that has 168",
         [] { return run(move_registers<176, 232>, 384, out); });
  expect("registers given by setmaxnreg.inc", "of a warp that has 168",
         [] { return run(move_registers<40, 160>, 384, out); });
  expect("setmaxnreg by one warp of four", "different setmaxnreg",
         [] { return run(registers_by_one_warp, 128, out); });
  expect("launch that the device would refuse", "kernel launch: invalid",
         [] { return run(early_exit, 2048, out); });
  expect("tensor map that the driver would refuse", "tensor map: box rows of 64", [] {
    make_tensor_map<bf16, 2>(reinterpret_cast<bf16*>(out), {64, 8}, {128}, {32, 8}, Swizzle::b128);
    return true;
  });
  expect("TMA 2-D", ok, tma_matches<2, Swizzle::none, 24>);
  expect("TMA 3-D", ok, tma_matches<3, Swizzle::none, 16>);
  expect("TMA 32-byte swizzle", ok, tma_matches<2, Swizzle::b32, 16>);
  expect("TMA 64-byte swizzle", ok, tma_matches<2, Swizzle::b64, 32>);
  expect("TMA 128-byte swizzle", ok, tma_matches<2, Swizzle::b128, 64>);
  expect("mma fragments are CuTe's", ok, [] {
    out[0] = 0;
    return run(mma_layout, 32, out) && out[0] == 0;
  });
  expect("wgmma 8, K-major", ok, wgmma_matches<bf16, 8, false, false, Swizzle::b128>);
  expect("wgmma 64, 64-byte swizzle", ok, wgmma_matches<__half, 64, false, false, Swizzle::b64>);
  expect("wgmma 72, 32-byte swizzle", ok, wgmma_matches<bf16, 72, false, false, Swizzle::b32>);
  expect("wgmma 128, N-major", ok, wgmma_matches<bf16, 128, false, true, Swizzle::b128>);
  expect("wgmma 96, N-major, 64-byte swizzle", ok,
         wgmma_matches<bf16, 96, false, true, Swizzle::b64>);
  expect("wgmma 80, N-major, 32-byte swizzle", ok,
         wgmma_matches<bf16, 80, true, true, Swizzle::b32>);
  expect("wgmma 256, A in registers", ok, wgmma_matches<__half, 256, true, false, Swizzle::b128>);
  expect("wgmma without fence", "no wgmma.fence",
         [] { return run(wgmma_misuse<Misuse::no_fence>, 128, out); });
  expect("wgmma never waited for", "not waited for",
         [] { return run(wgmma_misuse<Misuse::unwaited>, 128, out); });
  expect("wgmma, accumulator written", "were written before",
         [] { return run(wgmma_misuse<Misuse::accumulator_changed>, 128, out); });
  expect("wgmma, A written", "A registers were written before",
         [] { return run(wgmma_misuse<Misuse::a_changed>, 128, out); });
  expect("wgmma, no proxy fence", "no fence_proxy_async",
         [] { return run(wgmma_misuse<Misuse::no_proxy_fence>, 128, out); });
  expect("wgmma of a K-major operand within the first row of a pattern", ok,
         [] { return run(wgmma_placed<false>, 128, 32, 1024, uint64_t{0}); });
  expect("wgmma of a K-major operand within a pattern", "begins within a pattern",
         [] { return run(wgmma_placed<false>, 128, 128, 1024, uint64_t{0}); });
  expect("wgmma of an MN-major operand within a pattern", "begins within a pattern",
         [] { return run(wgmma_placed<true>, 128, 32, 1024, uint64_t{0}); });
  expect("wgmma with a stride that is no whole patterns", "no whole patterns",
         [] { return run(wgmma_placed<false>, 128, 0, 1152, uint64_t{0}); });
  expect("wgmma with a base offset", "base offset",
         [] { return run(wgmma_placed<false>, 128, 0, 1024, uint64_t{1} << 49); });
  expect("wgmma with reserved bits", "reserved bits",
         [] { return run(wgmma_placed<false>, 128, 0, 1024, uint64_t{1} << 14); });
  expect("intrinsics", ok, [] { return run(intrinsics, 1, out) && out[0] == 1; });
  expect("memset, memcpy", ok, [] {
    return cudaMemsetAsync(out, 0, 64, nullptr) == cudaSuccess &&
           cudaMemcpyAsync(out + 16, out, 64, cudaMemcpyDeviceToDevice, nullptr) == cudaSuccess &&
           out[16] == 0 && cudaMemsetAsync(nullptr, 0, 1, nullptr) == cudaErrorInvalidValue;
  });
  expect("blocks over OS threads", ok, [] {
    simt::options().threads = 3;
    out[0] = 0;
    launch(count_threads, 40, 128, 0, nullptr, out);
    return out[0] == 40 * 128;
  });
  printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}

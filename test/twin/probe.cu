// Calls every primitive of cuda/ptx.cuh on integer data, exact in any rounding, and prints a hash
// of its results. The twin's build prints probe.golden; nvcc's (build/Release/device_probe) has to
// print the same on a device. A line that differs is an error in that primitive's PTX, or in the
// twin.
#include <cstdio>
#include <vector>

#include "cuda/tensor_map.cuh"
#include "test/twin/probe.h"

namespace {

using namespace p2r::cuda;
using bf16 = __nv_bfloat16;
constexpr int words_out = 128 * 128;

__global__ void warp_ops(uint32_t* out) {
  const int t = threadIdx.x, lane = t & 31;
  uint32_t* o = out + t * 16;
  o[0] = __shfl_up_sync(~0u, lane, 3, 16);
  o[1] = __shfl_down_sync(~0u, lane, 5, 8);
  o[2] = __shfl_sync(~0u, lane, 9, 8);
  o[3] = __shfl_xor_sync(~0u, lane, 6);
  o[4] = __ballot_sync(~0u, lane % 3 == 0);
  o[5] = __match_any_sync(~0u, lane % 5);
  o[6] = __reduce_add_sync(~0u, unsigned(lane));
  o[7] = __syncthreads_count(t % 7 == 0);
}

__global__ void arithmetic(uint32_t* out) {
  const int t = threadIdx.x;
  uint32_t* o = out + t * 16;
  o[0] = __float_as_uint(ptx::ex2(float(t % 16 - 8)));
  o[1] = __float_as_uint(ptx::lg2(1.f));
  o[2] = ptx::pack2<bf16>(float(t), float(-t));
  o[3] = ptx::pack2<__half>(float(t), float(-t));
  o[4] = __umulhi(t * 0x9E3779B9u, 0x85EBCA6Bu) ^ __brev(t) ^ __byte_perm(t * 77777u, ~t, 0x3715);
  o[5] = __dp4a(t * 0x01020304, 0x7F80FF01, t) + __funnelshift_l(t, t * 0x9E3779B9u, t);
  o[6] = uint32_t(__float2int_rn(t * 0.5f - 20.f));
}

__global__ void named_barriers(uint32_t* out) {
  SMEM_ARRAY(uint32_t, s, 64);
  const int t = threadIdx.x;
  if (t < 64) {
    s[t] = t * 3;
    ptx::bar_arrive(1, 128);
  } else {
    ptx::bar_sync(1, 128);
    out[t - 64] = s[127 - t];
  }
}

template <bool Transposed>
__global__ void load_matrix(const bf16* x, uint32_t* out) {
  SMEM_DYN(bytes);
  const uint32_t s = ptx::smem_u32(bytes);
  const int t = threadIdx.x, lane = t & 31;
  for (int i = t; i < 256; i += 128) ptx::cp_async16(s + i * 16, x + i * 8, i % 7 != 3);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  const uint32_t row = s + (t / 32) * 1024 + lane * 16;
  uint32_t r2[2], r4[4];
  ptx::ldmatrix_x2<Transposed>(r2, row);
  ptx::ldmatrix_x4<Transposed>(r4, row);
  uint32_t* o = out + t * 16;
  for (int i = 0; i < 2; ++i) o[i] = r2[i];
  for (int i = 0; i < 4; ++i) o[2 + i] = r4[i];
}

template <class T>
__global__ void mma(uint32_t* out) {
  const int t = threadIdx.x;
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) {
    a[i] = ptx::pack2<T>(probe::small_value(t * 8 + i * 2), probe::small_value(t * 8 + i * 2 + 1));
    d[i] = float(t + i);
  }
  for (int i = 0; i < 2; ++i)
    b[i] = ptx::pack2<T>(probe::small_value(t * 4 + i * 2 + 9),
                         probe::small_value(t * 4 + i * 2 + 10));
  ptx::mma_m16n8k16<T>(d, a, b);
  for (int i = 0; i < 4; ++i) out[t * 4 + i] = __float_as_uint(d[i]);
}

template <int Rank>
__global__ void tma_in(const __grid_constant__ TensorMap map, int bytes, uint32_t* out) {
  SMEM_DYN(s);
  SMEM_ARRAY(uint64_t, bar, 1);
  const uint32_t b = ptx::smem_u32(bar);
  if (threadIdx.x == 0) {
    ptx::tma_prefetch(map);
    ptx::mbar_init(b, 2);
    ptx::mbar_fence_init();
    ptx::mbar_arrive(b);
    ptx::mbar_expect_tx(b, bytes / 2);
    ptx::mbar_arrive_expect_tx(b, bytes / 2);
    int c[Rank];
    for (int i = 0; i < Rank; ++i) c[i] = i & 1 ? -1 : 2;
    ptx::tma_load(ptx::smem_u32(s), map, b, c);
  }
  __syncthreads();
  ptx::mbar_wait(b, 0);
  for (int i = threadIdx.x; i < bytes / 4; i += 128) out[i] = reinterpret_cast<uint32_t*>(s)[i];
}

template <int Rank, bool Add>
__global__ void tma_out(const __grid_constant__ TensorMap map, int elements) {
  SMEM_DYN(s);
  for (int i = threadIdx.x; i < elements; i += 128)
    reinterpret_cast<float*>(s)[i] = float(i % 1000);
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    int c[Rank];
    for (int i = 0; i < Rank; ++i) c[i] = i & 1 ? -1 : 2;
    if (Add)
      ptx::tma_reduce_add(map, ptx::smem_u32(s), c);
    else
      ptx::tma_store(map, ptx::smem_u32(s), c);
    ptx::tma_commit();
    ptx::tma_wait_read<0>();
    ptx::tma_wait<0>();
  }
}

__global__ void bulk_out(float* to) {
  SMEM_DYN(s);
  for (int i = threadIdx.x; i < 512; i += 128) reinterpret_cast<float*>(s)[i] = float(i % 1000);
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::bulk_reduce_add(to, ptx::smem_u32(s), 2048);
    ptx::bulk_reduce_add(to + 8, ptx::smem_u32(s) + 64, 1024);
    ptx::tma_commit();
    ptx::tma_wait_read<0>();
    ptx::tma_wait<0>();
  }
}

__global__ void pairs_out(float* to) {
  // Each pair by two threads.
  const int pair = threadIdx.x % 64;
  ptx::red_add2(to + 2 * pair, float(threadIdx.x), float(3 * pair));
}

// Operands are linear arrays of integers: what counts is that both builds read the same elements.
template <class T, int N, bool FromRegisters, bool AMajor, bool BMajor, Swizzle Mode>
__global__ void __launch_bounds__(128) wgmma(uint32_t* out) {
  SMEM_DYN(bytes);
  T *a = reinterpret_cast<T*>(bytes), *b = a + 8192;
  const int t = threadIdx.x;
  for (int i = t; i < 8192; i += 128) a[i] = T(probe::small_value(i));
  for (int i = t; i < 256 * 64; i += 128) b[i] = T(probe::small_value(i + 5));
  ptx::fence_proxy_async();
  __syncthreads();
  constexpr int row = Mode == Swizzle::b128  ? 128
                      : Mode == Swizzle::b64 ? 64
                      : Mode == Swizzle::b32 ? 32
                                             : 16;
  constexpr int stride = row * 8, leading = Mode == Swizzle::none ? 4096 : row * 16;
  const uint64_t da = ptx::matrix_desc(ptx::smem_u32(a), leading, stride, Mode);
  const uint64_t db = ptx::matrix_desc(ptx::smem_u32(b), leading, stride, Mode);
  float d[N / 2];
  uint32_t r[4];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[i] = float(i);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    r[i] = ptx::pack2<T>(probe::small_value(t * 8 + i), probe::small_value(t + i));
  ptx::wgmma_keep(d);
  ptx::wgmma_keep(r);
  ptx::wgmma_fence();
  if constexpr (FromRegisters)
    ptx::wgmma_rs<T, N, BMajor>(d, r, db, true);
  else
    ptx::wgmma_ss<T, N, AMajor, BMajor>(d, da, db, t >= 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_keep(d);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) out[t * (N / 2) + i] = __float_as_uint(d[i]);
}

// 384 threads start with 168 registers each: what the first warpgroup gives, the others take.
__global__ void __launch_bounds__(384, 1) register_moves(uint32_t* out) {
  if (threadIdx.x < 128) {
    ptx::reg_dealloc<40>();
    out[threadIdx.x] = 1;
  } else {
    ptx::reg_alloc<232>();
    out[threadIdx.x] = 2;
  }
}

probe::Memory<bf16>* input;
probe::Memory<uint32_t>* output;

template <class K, class... A>
void run(const char* name, K kernel, int threads, A... args) {
  output->clear();
  launch(kernel, 1, unsigned(threads), 64 * 1024, nullptr, args...);
  printf("%s %016llx\n", name, output->hash());
}

// A tensor of 4 along every outer dimension; the box hangs over the edge of each.
template <class T, size_t Rank>
TensorMap map_of(T* base, uint32_t inner, Swizzle mode) {
  std::array<uint64_t, Rank> dims{};
  std::array<uint64_t, Rank - 1> strides{};
  std::array<uint32_t, Rank> box{};
  dims[0] = inner;
  box[0] = inner;
  uint64_t pitch = inner * sizeof(T);
  for (size_t i = 1; i < Rank; ++i) {
    strides[i - 1] = pitch;
    dims[i] = 4;
    box[i] = Rank == 2 ? 8 : 2;
    pitch *= 4;
  }
  return make_tensor_map<T, Rank>(base, dims, strides, box, mode);
}

template <size_t Rank>
void run_tma(const char* name, uint32_t inner, Swizzle mode) {
  const int bytes = int(inner) * 2 * (Rank == 2 ? 8 : 4);
  run((std::string("tma_load ") + name).c_str(), tma_in<Rank>, 128,
      map_of<bf16, Rank>(input->get(), inner, mode), bytes, output->get());
}

template <size_t Rank>
void run_tma_out(const char* name) {
  auto* base = reinterpret_cast<float*>(output->get());
  const auto map = map_of<float, Rank>(base, 16, Swizzle::none);
  const int elements = 16 * (Rank == 2 ? 8 : 4);
  run((std::string("tma_store ") + name).c_str(), tma_out<Rank, false>, 128, map, elements);
  run((std::string("tma_reduce_add ") + name).c_str(), tma_out<Rank, true>, 128, map, elements);
}

template <int N>
void run_wgmma() {
  const std::string n = "wgmma n" + std::to_string(N) + " ";
  uint32_t* o = output->get();
  constexpr Swizzle b128 = Swizzle::b128;
  run((n + "ss bf16").c_str(), wgmma<bf16, N, false, false, false, b128>, 128, o);
  run((n + "ss f16 b_mn").c_str(), wgmma<__half, N, false, false, true, b128>, 128, o);
  run((n + "rs bf16 b_mn").c_str(), wgmma<bf16, N, true, false, true, b128>, 128, o);
  run((n + "rs f16").c_str(), wgmma<__half, N, true, false, false, b128>, 128, o);
}

template <int N>
void run_ragged_wgmma() {
  const std::string n = "wgmma n" + std::to_string(N) + " 64B ";
  uint32_t* o = output->get();
  constexpr Swizzle b64 = Swizzle::b64;
  run((n + "rs bf16 b_mn").c_str(), wgmma<bf16, N, true, false, true, b64>, 128, o);
  run((n + "rs f16 b_mn").c_str(), wgmma<__half, N, true, false, true, b64>, 128, o);
  run((n + "ss bf16 b_mn").c_str(), wgmma<bf16, N, false, false, true, b64>, 128, o);
  run((n + "ss f16 a_mn b_mn").c_str(), wgmma<__half, N, false, true, true, b64>, 128, o);
}

}  // namespace

int main() try {
  probe::Memory<bf16> x(8192);
  probe::Memory<uint32_t> o(words_out);
  input = &x;
  output = &o;
  std::vector<bf16> values;
  for (int i = 0; i < 8192; ++i) values.push_back(__float2bfloat16(probe::small_value(i)));
  x.fill(values);
  uint32_t* to = o.get();

  run("warp_ops", warp_ops, 128, to);
  run("arithmetic", arithmetic, 128, to);
  run("named_barriers", named_barriers, 128, to);
  run("ldmatrix", load_matrix<false>, 128, x.get(), to);
  run("ldmatrix.trans", load_matrix<true>, 128, x.get(), to);
  run("mma bf16", mma<bf16>, 32, to);
  run("mma f16", mma<__half>, 32, to);
  run_tma<2>("2d", 64, Swizzle::none);
  run_tma<3>("3d", 64, Swizzle::none);
  run_tma<2>("2d 32B", 16, Swizzle::b32);
  run_tma<2>("2d 64B", 32, Swizzle::b64);
  run_tma<2>("2d 128B", 64, Swizzle::b128);
  run_tma_out<2>("2d");
  run_tma_out<3>("3d");
  run("bulk_reduce_add", bulk_out, 128, reinterpret_cast<float*>(to));
  run("red_add2", pairs_out, 128, reinterpret_cast<float*>(to));
  // First what is least like anything that others run: 72 and 80 columns do not divide into the
  // patterns of 32 (cuda/attention/wgmma.cuh).
  run_ragged_wgmma<72>();
  run_ragged_wgmma<80>();
  run_wgmma<8>();
  run_wgmma<16>();
  run_wgmma<64>();
  run_wgmma<72>();
  run_wgmma<80>();
  run_wgmma<96>();
  run_wgmma<112>();
  run_wgmma<128>();
  run_wgmma<160>();
  run_wgmma<176>();
  run_wgmma<192>();
  run_wgmma<256>();
  run("wgmma a_mn", wgmma<bf16, 64, false, true, false, Swizzle::b128>, 128, to);
  run("wgmma 64B", wgmma<bf16, 64, false, false, false, Swizzle::b64>, 128, to);
  run("wgmma 64B mn", wgmma<bf16, 64, false, true, true, Swizzle::b64>, 128, to);
  run("wgmma 32B", wgmma<bf16, 64, false, false, false, Swizzle::b32>, 128, to);
  run("wgmma 32B mn", wgmma<bf16, 64, false, true, true, Swizzle::b32>, 128, to);
  run("wgmma none", wgmma<bf16, 64, false, false, false, Swizzle::none>, 128, to);
  run("wgmma none mn", wgmma<bf16, 64, false, true, true, Swizzle::none>, 128, to);
  run("setmaxnreg", register_moves, 384, to);
  return 0;
} catch (const std::exception& e) {
  fprintf(stderr, "%s\n", e.what());
  return 1;
}

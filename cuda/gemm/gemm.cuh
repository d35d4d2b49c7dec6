// C = A B (+ bias), or C += A B, by the kernel that fits the types, the shape and the chip:
//
//   // out [N, F] = x [N, C] . weight [F, C]^T + bias
//   gemm<Along::k, Along::k>(device, Gemm<T, T, T>{.m = N, .n = F, .k = C, .a = {x, C},
//                                                  .b = {weight, C}, .c = out, .c_row_stride = F,
//                                                  .bias = bias});
//
// f16 and bf16 are multiplied on tensor cores, where lines of A and B begin at multiples of 16
// bytes: cuda/gemm/wgmma.cuh on Hopper, cuda/gemm/mma.cuh on all other chips. The rest is for
// cuda/gemm/plain.cuh. Sums are f32 everywhere, and their order follows from the shape and the
// kernel.
#pragma once
#include "cuda/gemm/mma.cuh"
#include "cuda/gemm/operands.cuh"
#include "cuda/gemm/wgmma.cuh"

namespace p2r::cuda {

namespace gemm_detail {

template <class T>
bool lines_aligned(const Operand<T>& x) {
  return x.stride > 0 && x.stride * sizeof(T) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

}  // namespace gemm_detail

// Whether a product of these runs on tensor cores.
template <class T>
bool on_tensor_cores(int64_t m, int64_t n, int64_t k, const Operand<T>& a, const Operand<T>& b) {
  return ptx::is_half<T> && m > 0 && n > 0 && k > 0 && gemm_detail::lines_aligned(a) &&
         gemm_detail::lines_aligned(b);
}

// Of the tiles that a device's tensor cores work on; they have as many rows everywhere.
constexpr int64_t kTileRows = gemm_sm90::kM;
static_assert(kTileRows == gemm_sm80::kM);
inline int64_t tile_columns(const Device& device) {
  return gemm_sm90::runs_on(device) ? gemm_sm90::kN : gemm_sm80::kN;
}

// Where on_tensor_cores: A B into an epilogue (cuda/gemm/tiles.cuh). Rows of tiles are cut into
// `spans` spans, at most one a tile, and k into at most `slices` slices.
template <Along a_along, Along b_along, class T, class Epilogue>
void multiply_tiles(Device& device, int64_t m, int64_t n, int64_t k, const Operand<T>& a,
                    const Operand<T>& b, int64_t spans, int64_t slices, const Epilogue& epilogue) {
  const int64_t rows = ceil_div(m, kTileRows), columns = ceil_div(n, tile_columns(device));
  const auto work = [&](int64_t steps) {
    return gemm_tiles::Work{rows, columns, steps, spans, std::min(slices, steps)};
  };
  if (gemm_sm90::runs_on(device))
    gemm_sm90::run<a_along, b_along>(device, m, n, k, a, b, work(ceil_div(k, gemm_sm90::kK)),
                                     epilogue);
  else
    gemm_sm80::run<a_along, b_along>(device, m, n, k, a, b, work(ceil_div(k, gemm_sm80::kK)),
                                     epilogue);
}

// Defined in gemm.cu, for the types and layouts listed there.
template <Along a_along, Along b_along, class A, class B, class C>
void gemm(Device& device, const Gemm<A, B, C>& g);

}  // namespace p2r::cuda

// C = A B (+ bias), or C += A B, by the kernel that fits the types, the shape and the chip:
//
//   // out [N, F] = x [N, C] . weight [F, C]^T + bias
//   gemm<Major::k, Major::k>(device, Gemm<T, T, T>{.m = N, .n = F, .k = C, .a = {x, C},
//                                                  .b = {weight, C}, .c = out, .c_row_stride = F,
//                                                  .bias = bias});
//
// f16 and bf16 run on tensor cores if the lines of A and B are aligned to 16 bytes:
// cuda/gemm/wgmma.cuh on Hopper, cuda/gemm/mma.cuh on all other chips. Everything else runs in
// cuda/gemm/plain.cuh. All accumulate in f32, in an order that the shape and the kernel fix.
#pragma once
#include "cuda/gemm/mma.cuh"
#include "cuda/gemm/operands.cuh"
#include "cuda/gemm/wgmma.cuh"

namespace p2r::cuda {

namespace gemm_detail {

template <class T>
bool is_aligned(const Operand<T>& x) {
  return x.stride > 0 && x.stride * sizeof(T) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

}  // namespace gemm_detail

// Whether the GEMM of these operands runs on tensor cores.
template <class T>
bool on_tensor_cores(int64_t m, int64_t n, int64_t k, const Operand<T>& a, const Operand<T>& b) {
  return ptx::is_half<T> && m > 0 && n > 0 && k > 0 && gemm_detail::is_aligned(a) &&
         gemm_detail::is_aligned(b);
}

// The tile of C on tensor cores; it has the same number of rows on every device.
constexpr int64_t kTileRows = gemm_wgmma::kM;
static_assert(kTileRows == gemm_mma::kM);
inline int64_t tile_columns(const Device& device) {
  return gemm_wgmma::runs_on(device) ? gemm_wgmma::kN : gemm_mma::kN;
}

// A B into an epilogue (cuda/gemm/tiles.cuh), for operands that are on_tensor_cores. A row of tiles
// is cut into `spans` spans, at most one a tile, and k into at most `splits` splits.
template <Major a_major, Major b_major, class T, class Epilogue>
void multiply_tiles(Device& device, int64_t m, int64_t n, int64_t k, const Operand<T>& a,
                    const Operand<T>& b, int64_t spans, int64_t splits, const Epilogue& epilogue) {
  const int64_t rows = ceil_div(m, kTileRows), columns = ceil_div(n, tile_columns(device));
  const auto scheduler = [&](int64_t steps) {
    return gemm_tiles::TileScheduler{rows, columns, steps, spans, std::min(splits, steps)};
  };
  if (gemm_wgmma::runs_on(device))
    gemm_wgmma::run<a_major, b_major>(device, m, n, k, a, b, scheduler(ceil_div(k, gemm_wgmma::kK)),
                                      epilogue);
  else
    gemm_mma::run<a_major, b_major>(device, m, n, k, a, b, scheduler(ceil_div(k, gemm_mma::kK)),
                                    epilogue);
}

// Defined in gemm.cu, for the types and layouts listed there.
template <Major a_major, Major b_major, class A, class B, class C>
void gemm(Device& device, const Gemm<A, B, C>& g);

}  // namespace p2r::cuda

// The products themselves: which kernel takes one, and the types and layouts that there are.
#include "cuda/gemm/gemm.cuh"
#include "cuda/gemm/plain.cuh"

namespace p2r::cuda {

namespace {

// Slices of at least 512 until all of a large chip has a tile, of at least 4096 until the last
// round of tiles is a small part of all.
int64_t slices_for(int64_t tiles, int64_t k) {
  constexpr int64_t kMostSlices = 64;
  const int64_t fill = std::min(ceil_div(128, tiles), k / 512);
  const int64_t even_out = std::min(ceil_div(1024, tiles), k / 4096);
  return std::clamp<int64_t>(std::max(fill, even_out), 1, kMostSlices);
}

}  // namespace

template <Along a_along, Along b_along, class A, class B, class C>
void gemm(Device& device, const Gemm<A, B, C>& g) {
  if (g.m <= 0 || g.n <= 0) return;
  if constexpr (ptx::is_half<A> && std::is_same_v<A, B>) {
    if (on_tensor_cores(g.m, g.n, g.k, g.a, g.b)) {
      using gemm_tiles::Store;
      const int64_t columns = ceil_div(g.n, tile_columns(device));
      const int64_t tiles = ceil_div(g.m, kTileRows) * columns;
      const int64_t slices = g.whole_k ? 1 : slices_for(tiles, g.k);
      if (slices == 1)
        return multiply_tiles<a_along, b_along>(
            device, g.m, g.n, g.k, g.a, g.b, columns, 1,
            Store<C>{g.c, g.m, g.n, g.c_row_stride, 0, g.accumulate, g.bias, g.scale});
      const Scratch scratch = device.scratch(slices * g.m * g.n * sizeof(float));
      float* partial = scratch.as<float>();
      multiply_tiles<a_along, b_along>(
          device, g.m, g.n, g.k, g.a, g.b, columns, slices,
          Store<float>{partial, g.m, g.n, g.n, g.m * g.n, false, {}, nullptr});
      return gemm_detail::finish(partial, slices, g.m, g.n, g.c, g.c_row_stride, g.accumulate,
                                 g.bias, g.scale, stream_of(device));
    }
  }
  gemm_plain::run(device, g, a_along, b_along);
}

// x W^T; dy W; dy^T x.
#define P2R_GEMMS(T)                                                      \
  template void gemm<Along::k, Along::k>(Device&, const Gemm<T, T, T>&);  \
  template void gemm<Along::k, Along::mn>(Device&, const Gemm<T, T, T>&); \
  template void gemm<Along::mn, Along::mn>(Device&, const Gemm<T, T, float>&);
P2R_GEMMS(float)
P2R_GEMMS(__half)
P2R_GEMMS(__nv_bfloat16)

// Of the head of a language model, whose logits, and their gradient off tensor cores, are f32.
#define P2R_HEAD_GEMMS(T)                                                     \
  template void gemm<Along::k, Along::k>(Device&, const Gemm<T, T, float>&);  \
  template void gemm<Along::k, Along::mn>(Device&, const Gemm<float, T, T>&); \
  template void gemm<Along::mn, Along::mn>(Device&, const Gemm<float, T, float>&);
P2R_HEAD_GEMMS(__half)
P2R_HEAD_GEMMS(__nv_bfloat16)

}  // namespace p2r::cuda

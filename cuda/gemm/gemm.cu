// Chooses a GEMM's kernel and its split-K, and instantiates the types and layouts that are used.
#include "cuda/gemm/gemm.cuh"
#include "cuda/gemm/plain.cuh"

namespace p2r::cuda {

namespace {

// Split-K: splits of at least 512 until every multiprocessor of a large chip has a tile; splits of
// at least 4096 until there are so many tiles that an incomplete last wave costs little.
int64_t splits_for(int64_t tiles, int64_t k) {
  constexpr int64_t kMaxSplits = 64;
  const int64_t to_fill = std::min(ceil_div(128, tiles), k / 512);
  const int64_t to_balance = std::min(ceil_div(1024, tiles), k / 4096);
  return std::clamp<int64_t>(std::max(to_fill, to_balance), 1, kMaxSplits);
}

}  // namespace

template <Major a_major, Major b_major, class A, class B, class C>
void gemm(Device& device, const Gemm<A, B, C>& g) {
  if (g.m <= 0 || g.n <= 0) return;
  if constexpr (ptx::is_half<A> && std::is_same_v<A, B>) {
    if (on_tensor_cores(g.m, g.n, g.k, g.a, g.b)) {
      using gemm_tiles::StoreEpilogue;
      const int64_t columns = ceil_div(g.n, tile_columns(device));
      const int64_t tiles = ceil_div(g.m, kTileRows) * columns;
      const int64_t splits = g.split_k ? splits_for(tiles, g.k) : 1;
      if (splits == 1)
        return multiply_tiles<a_major, b_major>(
            device, g.m, g.n, g.k, g.a, g.b, columns, 1,
            StoreEpilogue<C>{g.c, g.m, g.n, g.c_row_stride, 0, g.accumulate, g.bias, g.scale});
      const Scratch scratch = device.scratch(splits * g.m * g.n * sizeof(float));
      float* partials = scratch.as<float>();
      multiply_tiles<a_major, b_major>(
          device, g.m, g.n, g.k, g.a, g.b, columns, splits,
          StoreEpilogue<float>{partials, g.m, g.n, g.n, g.m * g.n, false, {}, nullptr});
      return gemm_detail::reduce_splits(partials, splits, g.m, g.n, g.c, g.c_row_stride,
                                        g.accumulate, g.bias, g.scale, stream_of(device));
    }
  }
  gemm_plain::run(device, g, a_major, b_major);
}

// x W^T; dy W; dy^T x.
#define P2R_GEMMS(T)                                                      \
  template void gemm<Major::k, Major::k>(Device&, const Gemm<T, T, T>&);  \
  template void gemm<Major::k, Major::mn>(Device&, const Gemm<T, T, T>&); \
  template void gemm<Major::mn, Major::mn>(Device&, const Gemm<T, T, float>&);
P2R_GEMMS(float)
P2R_GEMMS(__half)
P2R_GEMMS(__nv_bfloat16)

// For the head of a language model: its logits are f32, and so is their gradient where the GEMM
// runs without tensor cores.
#define P2R_HEAD_GEMMS(T)                                                     \
  template void gemm<Major::k, Major::k>(Device&, const Gemm<T, T, float>&);  \
  template void gemm<Major::k, Major::mn>(Device&, const Gemm<float, T, T>&); \
  template void gemm<Major::mn, Major::mn>(Device&, const Gemm<float, T, float>&);
P2R_HEAD_GEMMS(__half)
P2R_HEAD_GEMMS(__nv_bfloat16)

}  // namespace p2r::cuda

// C = A B of f16 or bf16 on the tensor cores of any chip since Ampere (mma.sync), sums in f32.
//
// A block of four warps owns a tile of 128 x 128 of C, a warp 32 rows of it, so that each row of
// the tile is in one warp, as the epilogues want it (cuda/gemm/tiles.cuh). A's 128 x 32 and B's 32
// x 128 of the next steps of k come into a ring of four stages by cp.async, 16 bytes at a time;
// ldmatrix takes them from there to registers, flipped where the operand is not stored along k.
// Chunks of 16 bytes are exchanged within 128, so that the eight of an ldmatrix lie in different
// banks.
//
// Why this tile. Per 16 of k a warp reads 5 KB of shared memory for 64 Ki multiply-adds, 80 bytes a
// cycle and multiprocessor of the 128 that an A100 has; 16 rows a warp would need 144. 128 sums a
// thread and 64 KB leave room for a second block on a multiprocessor, whose products fill the gaps
// of this one's start and epilogue, so that neither needs to be hidden within a block. Expected on
// an A100: 70 % of its 312 TFLOP/s.
#pragma once
#include "cuda/gemm/tiles.cuh"

namespace p2r::cuda::gemm_sm80 {

constexpr int kM = 128, kN = 128, kK = 32;
constexpr int kStages = 4, kThreads = 128, kBlocks = 2;  // on a multiprocessor
constexpr uint32_t kTileBytes = 128 * kK * 2;
constexpr size_t kShared = 2 * kStages * kTileBytes;

// Where the 16 bytes lie that begin at (mn, k) of a tile: lines of 32 k, or of 128 mn.
template <Along along>
__device__ __forceinline__ uint32_t place_of(uint32_t tile, int mn, int k) {
  return along == Along::k ? tile + mn * 64 + ((k / 8) ^ (mn / 2 % 4)) * 16
                           : tile + k * 256 + ((mn / 8) ^ (k % 8)) * 16;
}

// What of x lies past its ends arrives as zeros.
template <Along along, class T>
__device__ __forceinline__ void load_tile(uint32_t tile, const Operand<T>& x, int64_t first,
                                          int64_t across, int64_t first_k, int64_t k) {
  constexpr int kChunks = kTileBytes / 16, kOfLine = along == Along::k ? kK / 8 : 16;
#pragma unroll
  for (int i = 0; i < kChunks / kThreads; ++i) {
    const int chunk = static_cast<int>(threadIdx.x) + i * kThreads;
    const int line = chunk / kOfLine, column = chunk % kOfLine * 8;
    const int mn = along == Along::k ? line : column, kk = along == Along::k ? column : line;
    const bool inside = first + mn < across && first_k + kk < k;
    const int64_t offset = along == Along::k ? (first + mn) * x.stride + first_k + kk
                                             : (first_k + kk) * x.stride + first + mn;
    ptx::cp_async16(place_of<along>(tile, mn, kk), inside ? x.data + offset : x.data, inside);
  }
}

// The registers that mma.sync takes for A's rows mn .. mn + 16, or two times 8 columns of B, and 16
// of k.
template <Along along, bool a_operand>
__device__ __forceinline__ void fragment(uint32_t (&r)[4], uint32_t tile, int mn, int k) {
  const int lane = static_cast<int>(threadIdx.x) % 32, low = lane / 8 % 2 * 8, high = lane / 16 * 8;
  if constexpr (along == Along::k)
    ptx::ldmatrix_x4(r, place_of<along>(tile, mn + lane % 8 + (a_operand ? low : high),
                                        k + (a_operand ? high : low)));
  else
    ptx::ldmatrix_x4<true>(r, place_of<along>(tile, mn + (a_operand ? low : high),
                                              k + lane % 8 + (a_operand ? high : low)));
}

template <class T, Along a_along, Along b_along, class Epilogue>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gemm_sm80_kernel(Operand<T> a, Operand<T> b, int64_t m, int64_t n, int64_t k,
                     gemm_tiles::Work work, Epilogue epilogue) {
  SMEM_DYN(bytes);
  const uint32_t ring = ptx::smem_u32(bytes);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t i = blockIdx.x; i < work.items(); i += gridDim.x) {
    const gemm_tiles::Item item = work[i];
    gemm_tiles::Place place = {0, 0, item.span, item.slice};
    const int64_t row = item.row * kM + 32 * warp + lane / 4;
    typename Epilogue::State state[2];
    epilogue.begin(state[0]);
    epilogue.begin(state[1]);
    for (int64_t tile = item.first_tile; tile < item.last_tile; ++tile) {
      // A group of copies a step, empty past the last one.
      const auto load = [&](int64_t step) {
        const uint32_t stage = ring + static_cast<uint32_t>(step % kStages) * 2 * kTileBytes;
        if (step < item.last_step) {
          load_tile<a_along>(stage, a, item.row * kM, m, step * kK, k);
          load_tile<b_along>(stage + kTileBytes, b, tile * kN, n, step * kK, k);
        }
        ptx::cp_async_commit();
      };
      for (int s = 0; s < kStages - 1; ++s) load(item.first_step + s);
      float sums[2][kN / 2] = {};
      for (int64_t step = item.first_step; step < item.last_step; ++step) {
        ptx::cp_async_wait<kStages - 2>();
        __syncthreads();  // this step is there for all, and the one before is done with
        load(step + kStages - 1);
        const uint32_t a_tile = ring + static_cast<uint32_t>(step % kStages) * 2 * kTileBytes;
        const uint32_t b_tile = a_tile + kTileBytes;
#pragma unroll
        for (int part = 0; part < kK; part += 16) {
          uint32_t rows[2][4];
          fragment<a_along, true>(rows[0], a_tile, 32 * warp, part);
          fragment<a_along, true>(rows[1], a_tile, 32 * warp + 16, part);
#pragma unroll
          for (int column = 0; column < kN; column += 16) {
            uint32_t columns[4];
            fragment<b_along, false>(columns, b_tile, column, part);
            const uint32_t left[2] = {columns[0], columns[1]}, right[2] = {columns[2], columns[3]};
#pragma unroll
            for (int f = 0; f < 2; ++f) {
              float* at = sums[f] + column / 2;
              ptx::mma_m16n8k16<T>(*reinterpret_cast<float(*)[4]>(at), rows[f], left);
              ptx::mma_m16n8k16<T>(*reinterpret_cast<float(*)[4]>(at + 4), rows[f], right);
            }
          }
        }
      }
      ptx::cp_async_wait<0>();
      __syncthreads();  // before the next tile's steps take the places of these
      place.column = tile * kN + 2 * (lane % 4);
#pragma unroll
      for (int f = 0; f < 2; ++f) {
        place.row = row + 16 * f;
        epilogue.tile(state[f], sums[f], place);
      }
    }
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      place.row = row + 16 * f;
      epilogue.end(state[f], place);
    }
  }
}

template <Along a_along, Along b_along, class T, class Epilogue>
void run(Device& device, int64_t m, int64_t n, int64_t k, const Operand<T>& a, const Operand<T>& b,
         const gemm_tiles::Work& work, const Epilogue& epilogue) {
  const int64_t blocks = std::min<int64_t>(work.items(), kBlocks * multiprocessors(device));
  launch(gemm_sm80_kernel<T, a_along, b_along, Epilogue>, static_cast<unsigned>(blocks), kThreads,
         kShared, stream_of(device), a, b, m, n, k, work, epilogue);
}

}  // namespace p2r::cuda::gemm_sm80

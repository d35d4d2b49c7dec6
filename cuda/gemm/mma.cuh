// C = A B of f16 or bf16 on the tensor cores of any chip since Ampere: cp.async, ldmatrix and
// mma.sync, accumulated in f32.
//
// A block of four warps computes a tile of 128 x 128 of C, a warp 32 rows of it, so that each row
// of the tile is in one warp, as the epilogues need it (cuda/gemm/tiles.cuh). A's 128 x 32 and B's
// 32 x 128 of the next steps of k are loaded into a ring buffer of four stages by cp.async, 16
// bytes at a time; ldmatrix loads fragments from there, transposed for an MN-major operand. Chunks
// of 16 bytes are XOR-swizzled within 128, so that the eight rows of an ldmatrix are in different
// banks.
//
// Why this tile. Per 16 of k a warp reads 5 KB of shared memory for 64 Ki multiply-adds, 80 bytes a
// cycle and multiprocessor of the 128 that an A100 has; 16 rows a warp would need 144. 128
// accumulators a thread and 64 KB leave room for a second block on a multiprocessor, whose mma hide
// this one's prologue and epilogue, so that neither needs to be overlapped within a block. Expected
// on an A100: 70 % of its 312 TFLOP/s.
#pragma once
#include "cuda/gemm/tiles.cuh"

namespace p2r::cuda::gemm_mma {

constexpr int kM = 128, kN = 128, kK = 32;
constexpr int kStages = 4, kThreads = 128, kBlocksPerSm = 2;
constexpr uint32_t kTileBytes = 128 * kK * 2;
constexpr size_t kShared = 2 * kStages * kTileBytes;

// The address of the 16 bytes that begin at (mn, k) of a tile. Its lines are 32 k long if K-major,
// 128 mn if MN-major.
template <Major major>
__device__ __forceinline__ uint32_t swizzled(uint32_t tile, int mn, int k) {
  return major == Major::k ? tile + mn * 64 + ((k / 8) ^ (mn / 2 % 4)) * 16
                           : tile + k * 256 + ((mn / 8) ^ (k % 8)) * 16;
}

// Zeros are loaded outside x.
template <Major major, class T>
__device__ __forceinline__ void load_tile(uint32_t tile, const Operand<T>& x, int64_t first,
                                          int64_t extent, int64_t first_k, int64_t k) {
  constexpr int kChunks = kTileBytes / 16, kChunksPerLine = major == Major::k ? kK / 8 : 16;
#pragma unroll
  for (int i = 0; i < kChunks / kThreads; ++i) {
    const int chunk = static_cast<int>(threadIdx.x) + i * kThreads;
    const int line = chunk / kChunksPerLine, column = chunk % kChunksPerLine * 8;
    const int mn = major == Major::k ? line : column, kk = major == Major::k ? column : line;
    const bool inside = first + mn < extent && first_k + kk < k;
    const int64_t offset = major == Major::k ? (first + mn) * x.stride + first_k + kk
                                             : (first_k + kk) * x.stride + first + mn;
    ptx::cp_async16(swizzled<major>(tile, mn, kk), inside ? x.data + offset : x.data, inside);
  }
}

// mma.sync's fragment of 16 k and A's rows mn .. mn + 15, or two of B's columns mn .. mn + 7 and
// mn + 8 .. mn + 15.
template <Major major, bool a_operand>
__device__ __forceinline__ void load_fragment(uint32_t (&r)[4], uint32_t tile, int mn, int k) {
  const int lane = static_cast<int>(threadIdx.x) % 32, low = lane / 8 % 2 * 8, high = lane / 16 * 8;
  if constexpr (major == Major::k)
    ptx::ldmatrix_x4(r, swizzled<major>(tile, mn + lane % 8 + (a_operand ? low : high),
                                        k + (a_operand ? high : low)));
  else
    ptx::ldmatrix_x4<true>(r, swizzled<major>(tile, mn + (a_operand ? low : high),
                                              k + lane % 8 + (a_operand ? high : low)));
}

template <class T, Major a_major, Major b_major, class Epilogue>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    gemm_mma_kernel(Operand<T> a, Operand<T> b, int64_t m, int64_t n, int64_t k,
                    gemm_tiles::TileScheduler scheduler, Epilogue epilogue) {
  SMEM_DYN(bytes);
  const uint32_t ring = ptx::smem_u32(bytes);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t i = blockIdx.x; i < scheduler.units(); i += gridDim.x) {
    const gemm_tiles::WorkUnit unit = scheduler[i];
    gemm_tiles::FragmentCoord coord = {0, 0, unit.span, unit.split};
    const int64_t row = unit.row * kM + 32 * warp + lane / 4;
    typename Epilogue::State state[2];
    epilogue.begin(state[0]);
    epilogue.begin(state[1]);
    for (int64_t tile = unit.first_tile; tile < unit.last_tile; ++tile) {
      // Commits one group of copies a step, an empty one past the last step.
      const auto load = [&](int64_t step) {
        const uint32_t stage = ring + static_cast<uint32_t>(step % kStages) * 2 * kTileBytes;
        if (step < unit.last_step) {
          load_tile<a_major>(stage, a, unit.row * kM, m, step * kK, k);
          load_tile<b_major>(stage + kTileBytes, b, tile * kN, n, step * kK, k);
        }
        ptx::cp_async_commit();
      };
      for (int s = 0; s < kStages - 1; ++s) load(unit.first_step + s);
      float acc[2][kN / 2] = {};
      for (int64_t step = unit.first_step; step < unit.last_step; ++step) {
        ptx::cp_async_wait<kStages - 2>();
        __syncthreads();  // this step's stage is loaded, and all warps have read the previous one
        load(step + kStages - 1);
        const uint32_t a_tile = ring + static_cast<uint32_t>(step % kStages) * 2 * kTileBytes;
        const uint32_t b_tile = a_tile + kTileBytes;
#pragma unroll
        for (int k_block = 0; k_block < kK; k_block += 16) {
          uint32_t a_frag[2][4];
          load_fragment<a_major, true>(a_frag[0], a_tile, 32 * warp, k_block);
          load_fragment<a_major, true>(a_frag[1], a_tile, 32 * warp + 16, k_block);
#pragma unroll
          for (int column = 0; column < kN; column += 16) {
            uint32_t b_frag[4];
            load_fragment<b_major, false>(b_frag, b_tile, column, k_block);
            const uint32_t b_left[2] = {b_frag[0], b_frag[1]}, b_right[2] = {b_frag[2], b_frag[3]};
#pragma unroll
            for (int f = 0; f < 2; ++f) {
              float* tile_acc = acc[f] + column / 2;
              ptx::mma_m16n8k16<T>(*reinterpret_cast<float(*)[4]>(tile_acc), a_frag[f], b_left);
              ptx::mma_m16n8k16<T>(*reinterpret_cast<float(*)[4]>(tile_acc + 4), a_frag[f],
                                   b_right);
            }
          }
        }
      }
      ptx::cp_async_wait<0>();
      __syncthreads();  // all stages are read before the next tile overwrites them
      coord.column = tile * kN + 2 * (lane % 4);
#pragma unroll
      for (int f = 0; f < 2; ++f) {
        coord.row = row + 16 * f;
        epilogue.tile(state[f], acc[f], coord);
      }
    }
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      coord.row = row + 16 * f;
      epilogue.end(state[f], coord);
    }
  }
}

template <Major a_major, Major b_major, class T, class Epilogue>
void run(Device& device, int64_t m, int64_t n, int64_t k, const Operand<T>& a, const Operand<T>& b,
         const gemm_tiles::TileScheduler& scheduler, const Epilogue& epilogue) {
  const int64_t blocks =
      std::min<int64_t>(scheduler.units(), kBlocksPerSm * multiprocessors(device));
  launch(gemm_mma_kernel<T, a_major, b_major, Epilogue>, static_cast<unsigned>(blocks), kThreads,
         kShared, stream_of(device), a, b, m, n, k, scheduler, epilogue);
}

}  // namespace p2r::cuda::gemm_mma

// C = A B of f16 or bf16 on Hopper's tensor cores (sm_90a): TMA, mbarriers and wgmma, accumulated
// in f32.
//
// Warp-specialised persistent blocks of three warpgroups, one block a multiprocessor, that loop
// over the work units of cuda/gemm/tiles.cuh. A block computes a tile of 128 x 256 of C at a time.
// Two consumer warpgroups multiply, 64 rows each, 128 accumulators a thread; one thread of the
// producer warpgroup loads A's 128 x 64 and B's 64 x 256 of the next steps of k by TMA into a ring
// buffer of four stages. Nothing else goes through memory: accumulators leave their registers once,
// in the epilogue. A consumer warp releases a stage when the wgmmas that read it have completed,
// one step behind, so that the tensor cores always have the next ones queued. The pipeline runs on
// across the ends of tiles: the next tile's first four stages are loaded during this one's
// epilogue.
//
// Either operand may be K-major or MN-major: wgmma reads both from shared memory with 128-byte
// swizzle. So the three products of a linear layer, x W^T, dy W and dy^T x, need no transposed
// copies. TMA needs strides that are multiples of 16 bytes, so of 8 elements; outside A and B it
// loads zeros. An element of C is one sum over its split of k, in order, whatever else the launch
// computes.
//
// Why this tile. The tensor cores take 64 x 256 x 16 in 128 cycles, so a step of 128 x 256 x 64
// takes 1024. It reads 48 KB through L2, 48 bytes a cycle and multiprocessor, near what an H100's
// L2 delivers; 128 x 128 would need 64. From shared memory the wgmmas read 80 bytes a cycle of the
// 128 there are. 128 accumulators a thread leave 112 registers for the epilogue. Four stages are
// 192 KB of the 227, 4096 cycles ahead, several times the latency of HBM. Larger tiles do not fit
// the registers (256 x 256) or leave three stages (192 x 256).
//
// Predictions for an H200 (132 multiprocessors at some 1.5 to 1.7 GHz under load; 790 TFLOP/s
// measured by others as the dense rate), to be checked on one:
//  - main loop alone, k >= 2048: 660 TFLOP/s, limited by L2. Clusters of two blocks with multicast
//    would load B once for both (32 bytes a cycle), for some 710.
//  - x W^T, [16384, 2560] x [2560, 2560]^T: 1280 tiles on 132 multiprocessors are 9.7 waves of 10,
//    and an epilogue costs 2000 of 41 000 cycles: 610 TFLOP/s.
//  - linearLogProbs forward, C = 2560, V = 151 936: 620 to 650, against a goal of 650. Its
//  epilogue,
//    bound by the issue of exponentials, takes some 2500 of 41 000 cycles, and only the four stages
//    that are loaded ahead overlap with it.
#pragma once
#include <array>

#include "cuda/gemm/tiles.cuh"
#include "cuda/tensor_map.cuh"

namespace p2r::cuda::gemm_wgmma {

constexpr int kM = 128, kN = 256, kK = 64;
constexpr int kStages = 4, kConsumers = 2, kThreads = 128 * (1 + kConsumers);
constexpr uint32_t kBytesA = kM * kK * 2, kBytesB = kN * kK * 2, kStageBytes = kBytesA + kBytesB;
constexpr size_t kShared = kStages * kStageBytes + 2 * kStages * sizeof(uint64_t);

// A tile of kK x `extent` is loaded in boxes with rows of 128 bytes, the width of the swizzle:
// K-major as one box of `extent` rows, MN-major as consecutive boxes of 64 x 64. In both layouts 64
// of its rows (A) or columns (B) are 8 KB.
constexpr uint32_t kBoxBytes = 64 * kK * 2;

template <Major major, int extent>
__device__ __forceinline__ void load_tile(uint32_t to, const TensorMap& map, uint32_t bar,
                                          int64_t first, int64_t k) {
  if constexpr (major == Major::k) {
    ptx::tma_load(to, map, bar, {static_cast<int>(k), static_cast<int>(first)});
  } else {
#pragma unroll
    for (int box = 0; box < extent / 64; ++box)
      ptx::tma_load(to + box * kBoxBytes, map, bar,
                    {static_cast<int>(first) + 64 * box, static_cast<int>(k)});
  }
}

// wgmma's descriptor of k = 16 * k_block .. 16 * k_block + 15 of a tile.
template <Major major>
__device__ __forceinline__ uint64_t smem_descriptor(uint32_t tile, int k_block) {
  return major == Major::k
             ? ptx::matrix_desc(tile + 32 * k_block, 0, 1024, Swizzle::b128)
             : ptx::matrix_desc(tile + 2048 * k_block, kBoxBytes, 1024, Swizzle::b128);
}

// The stage of the ring that a thread is at, and the phase of that stage's mbarriers.
struct PipelineState {
  int stage = 0, phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

template <class T, Major a_major, Major b_major, class Epilogue>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_wgmma_kernel(const __grid_constant__ TensorMap a_map,
                      const __grid_constant__ TensorMap b_map, gemm_tiles::TileScheduler scheduler,
                      Epilogue epilogue) {
  if constexpr (ptx::on_sm90a) {
    SMEM_DYN(bytes);
    const uint32_t ring = ptx::smem_u32(bytes);
    const uint32_t full = ring + kStages * kStageBytes, empty = full + 8 * kStages;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    if (threadIdx.x == 0) {
      ptx::tma_prefetch(a_map);
      ptx::tma_prefetch(b_map);
      for (int i = 0; i < kStages; ++i) {
        ptx::mbar_init(full + 8 * i, 1);
        ptx::mbar_init(empty + 8 * i, 4 * kConsumers);
      }
      ptx::mbar_fence_init();
    }
    __syncthreads();

    if (warp < 4) {
      ptx::reg_dealloc<24>();
      if (threadIdx.x != 0) return;
      PipelineState pipe;
      for (int64_t i = blockIdx.x; i < scheduler.units(); i += gridDim.x) {
        const gemm_tiles::WorkUnit unit = scheduler[i];
        for (int64_t tile = unit.first_tile; tile < unit.last_tile; ++tile)
          for (int64_t step = unit.first_step; step < unit.last_step; ++step, pipe.advance()) {
            const uint32_t bar = full + 8 * pipe.stage, stage = ring + pipe.stage * kStageBytes;
            ptx::mbar_wait(empty + 8 * pipe.stage, pipe.phase ^ 1);
            ptx::mbar_arrive_expect_tx(bar, kStageBytes);
            load_tile<a_major, kM>(stage, a_map, bar, unit.row * kM, step * kK);
            load_tile<b_major, kN>(stage + kBytesA, b_map, bar, tile * kN, step * kK);
          }
      }
    } else {
      ptx::reg_alloc<240>();
      const int group = warp / 4 - 1;
      float acc[kN / 2];
      PipelineState pipe;
      for (int64_t i = blockIdx.x; i < scheduler.units(); i += gridDim.x) {
        const gemm_tiles::WorkUnit unit = scheduler[i];
        gemm_tiles::FragmentCoord at = {unit.row * kM + 16 * (warp - 4) + lane / 4, 0, unit.span,
                                        unit.split};
        typename Epilogue::State state;
        epilogue.begin(state);
        for (int64_t tile = unit.first_tile; tile < unit.last_tile; ++tile) {
          uint32_t previous = 0;  // the `empty` barrier of the previous step's stage
          for (int64_t step = unit.first_step; step < unit.last_step; ++step, pipe.advance()) {
            const uint32_t a = ring + pipe.stage * kStageBytes + group * kBoxBytes;
            const uint32_t b = ring + pipe.stage * kStageBytes + kBytesA;
            ptx::mbar_wait(full + 8 * pipe.stage, pipe.phase);
            ptx::wgmma_keep(acc);
            ptx::wgmma_fence();
#pragma unroll
            for (int k_block = 0; k_block < kK / 16; ++k_block)
              ptx::wgmma_ss<T, kN, a_major == Major::mn, b_major == Major::mn>(
                  acc, smem_descriptor<a_major>(a, k_block), smem_descriptor<b_major>(b, k_block),
                  step > unit.first_step || k_block > 0);
            ptx::wgmma_commit();
            ptx::wgmma_wait<1>();
            if (previous && lane == 0) ptx::mbar_arrive(previous);
            previous = empty + 8 * pipe.stage;
          }
          ptx::wgmma_wait<0>();
          ptx::wgmma_keep(acc);
          if (lane == 0) ptx::mbar_arrive(previous);
          at.column = tile * kN + 2 * (lane % 4);
          epilogue.tile(state, acc, at);
        }
        epilogue.end(state, at);
      }
    }
  } else {
    ptx::trap();
  }
}

inline bool runs_on(const Device& device) { return device.info().capability == "9.0"; }

// The tensor map of an operand with `extent` rows (A) or columns (B), in load_tile's boxes.
template <Major major, class T>
TensorMap operand_map(const Operand<T>& x, int64_t extent, int64_t k, uint32_t rows_of_box) {
  const uint64_t inner = static_cast<uint64_t>(major == Major::k ? k : extent);
  const uint64_t lines = static_cast<uint64_t>(major == Major::k ? extent : k);
  return make_tensor_map<T, 2>(x.data, {inner, lines},
                               {static_cast<uint64_t>(x.stride) * sizeof(T)},
                               {64, major == Major::k ? rows_of_box : kK}, Swizzle::b128);
}

template <Major a_major, Major b_major, class T, class Epilogue>
void run(Device& device, int64_t m, int64_t n, int64_t k, const Operand<T>& a, const Operand<T>& b,
         const gemm_tiles::TileScheduler& scheduler, const Epilogue& epilogue) {
  const int64_t blocks = std::min<int64_t>(scheduler.units(), multiprocessors(device));
  launch(gemm_wgmma_kernel<T, a_major, b_major, Epilogue>, static_cast<unsigned>(blocks), kThreads,
         kShared, stream_of(device), operand_map<a_major>(a, m, k, kM),
         operand_map<b_major>(b, n, k, kN), scheduler, epilogue);
}

}  // namespace p2r::cuda::gemm_wgmma

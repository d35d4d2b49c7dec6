// C = A B of f16 or bf16 on Hopper's tensor cores (sm_90a), sums in f32.
//
// A block of three warpgroups stays on its multiprocessor and takes items (cuda/gemm/tiles.cuh)
// until none is left. It owns a tile of 128 x 256 of C at a time: two warpgroups multiply, 64 rows
// each, a thread holding 128 of the tile's sums; of the third, one thread brings A's 128 x 64 and
// B's 64 x 256 of the next steps of k into a ring of four stages by TMA. Nothing else crosses
// memory: a sum leaves its register once, through the epilogue. Each warp hands a stage back when
// the products that read it are over, one step behind, so that the tensor cores always have the
// next ones queued; the ring runs on over the ends of tiles, so that the next tile's first four
// steps arrive while this one's epilogue runs.
//
// Either operand may be stored along k or along its rows or columns: the tensor core reads both
// from 128-byte rows of shared memory. So the three products of a linear layer, x W^T, dy W and
// dy^T x, need no transposed copies. TMA wants lines of a multiple of 16 bytes, so of 8 elements;
// what lies past the ends of A and B arrives as zeros. Each sum is one run over its slice of k, in
// order, whatever else the launch holds.
//
// Why this tile. The tensor cores take 64 x 256 x 16 in 128 cycles, so a step of 128 x 256 x 64
// takes 1024. It reads 48 KB through L2, 48 bytes a cycle and multiprocessor, near what an H100's
// L2 delivers; 128 x 128 would need 64. From shared memory the products read 80 bytes a cycle of
// the 128 there are. 128 sums a thread leave 112 registers for the epilogue. Four stages are 192 KB
// of the 227, 4096 cycles ahead, several times the latency of HBM. Larger tiles fail on registers
// (256 x 256) or leave three stages (192 x 256).
//
// Predictions for an H200 (132 multiprocessors at some 1.5 to 1.7 GHz under load; 790 TFLOP/s
// measured by others as the dense rate), to be checked on one:
//  - main loop alone, k >= 2048: 660 TFLOP/s, held back by L2. The other loads of B could be saved
//    by clusters of two blocks with multicast (32 bytes a cycle), for some 710.
//  - x W^T, [16384, 2560] x [2560, 2560]^T: 1280 items on 132 multiprocessors are 9.7 rounds of 10,
//    and an epilogue costs 2000 of 41 000 cycles: 610 TFLOP/s.
//  - linearLogProbs forward, C = 2560, V = 151 936: 650 asked for; the epilogue's two exponentials
//    of instruction time a pair of sums, some 2500 cycles of 41 000, unhidden but for the four
//    stages of head start, give 620 to 650.
#pragma once
#include <array>

#include "cuda/gemm/tiles.cuh"
#include "cuda/tensor_map.cuh"

namespace p2r::cuda::gemm_sm90 {

constexpr int kM = 128, kN = 256, kK = 64;
constexpr int kStages = 4, kConsumers = 2, kThreads = 128 * (1 + kConsumers);
constexpr uint32_t kBytesA = kM * kK * 2, kBytesB = kN * kK * 2, kStageBytes = kBytesA + kBytesB;
constexpr size_t kShared = kStages * kStageBytes + 2 * kStages * sizeof(uint64_t);

// A tile of kK x `across` arrives in boxes with rows of 128 bytes: along k one box of `across`
// rows, else boxes of 64 x 64 behind each other. Both times 64 of its rows or columns are 8 KB.
constexpr uint32_t kBoxBytes = 64 * kK * 2;

template <Along along, int across>
__device__ __forceinline__ void load_tile(uint32_t to, const TensorMap& map, uint32_t bar,
                                          int64_t first, int64_t k) {
  if constexpr (along == Along::k) {
    ptx::tma_load(to, map, bar, {static_cast<int>(k), static_cast<int>(first)});
  } else {
#pragma unroll
    for (int box = 0; box < across / 64; ++box)
      ptx::tma_load(to + box * kBoxBytes, map, bar,
                    {static_cast<int>(first) + 64 * box, static_cast<int>(k)});
  }
}

// Of the 16 k from 16 * part of a tile.
template <Along along>
__device__ __forceinline__ uint64_t descriptor(uint32_t tile, int part) {
  return along == Along::k ? ptx::matrix_desc(tile + 32 * part, 0, 1024, Swizzle::b128)
                           : ptx::matrix_desc(tile + 2048 * part, kBoxBytes, 1024, Swizzle::b128);
}

// Where in the ring a thread is.
struct Turn {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <class T, Along a_along, Along b_along, class Epilogue>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_sm90_kernel(const __grid_constant__ TensorMap a_map,
                     const __grid_constant__ TensorMap b_map, gemm_tiles::Work work,
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
      Turn turn;
      for (int64_t i = blockIdx.x; i < work.items(); i += gridDim.x) {
        const gemm_tiles::Item item = work[i];
        for (int64_t tile = item.first_tile; tile < item.last_tile; ++tile)
          for (int64_t step = item.first_step; step < item.last_step; ++step, turn.next()) {
            const uint32_t bar = full + 8 * turn.stage, stage = ring + turn.stage * kStageBytes;
            ptx::mbar_wait(empty + 8 * turn.stage, turn.parity ^ 1);
            ptx::mbar_arrive_expect_tx(bar, kStageBytes);
            load_tile<a_along, kM>(stage, a_map, bar, item.row * kM, step * kK);
            load_tile<b_along, kN>(stage + kBytesA, b_map, bar, tile * kN, step * kK);
          }
      }
    } else {
      ptx::reg_alloc<240>();
      const int group = warp / 4 - 1;
      float sums[kN / 2];
      Turn turn;
      for (int64_t i = blockIdx.x; i < work.items(); i += gridDim.x) {
        const gemm_tiles::Item item = work[i];
        gemm_tiles::Place place = {item.row * kM + 16 * (warp - 4) + lane / 4, 0, item.span,
                                   item.slice};
        typename Epilogue::State state;
        epilogue.begin(state);
        for (int64_t tile = item.first_tile; tile < item.last_tile; ++tile) {
          uint32_t before = 0;  // the barrier of the stage of the step before
          for (int64_t step = item.first_step; step < item.last_step; ++step, turn.next()) {
            const uint32_t a = ring + turn.stage * kStageBytes + group * kBoxBytes;
            const uint32_t b = ring + turn.stage * kStageBytes + kBytesA;
            ptx::mbar_wait(full + 8 * turn.stage, turn.parity);
            ptx::wgmma_keep(sums);
            ptx::wgmma_fence();
#pragma unroll
            for (int part = 0; part < kK / 16; ++part)
              ptx::wgmma_ss<T, kN, a_along == Along::mn, b_along == Along::mn>(
                  sums, descriptor<a_along>(a, part), descriptor<b_along>(b, part),
                  step > item.first_step || part > 0);
            ptx::wgmma_commit();
            ptx::wgmma_wait<1>();
            if (before && lane == 0) ptx::mbar_arrive(before);
            before = empty + 8 * turn.stage;
          }
          ptx::wgmma_wait<0>();
          ptx::wgmma_keep(sums);
          if (lane == 0) ptx::mbar_arrive(before);
          place.column = tile * kN + 2 * (lane % 4);
          epilogue.tile(state, sums, place);
        }
        epilogue.end(state, place);
      }
    }
  } else {
    ptx::trap();
  }
}

inline bool runs_on(const Device& device) { return device.info().capability == "9.0"; }

// The map of an operand of `across` rows or columns, in boxes as load_tile takes them.
template <Along along, class T>
TensorMap map_of(const Operand<T>& x, int64_t across, int64_t k, uint32_t rows_of_box) {
  const uint64_t inner = static_cast<uint64_t>(along == Along::k ? k : across);
  const uint64_t lines = static_cast<uint64_t>(along == Along::k ? across : k);
  return make_tensor_map<T, 2>(x.data, {inner, lines},
                               {static_cast<uint64_t>(x.stride) * sizeof(T)},
                               {64, along == Along::k ? rows_of_box : kK}, Swizzle::b128);
}

template <Along a_along, Along b_along, class T, class Epilogue>
void run(Device& device, int64_t m, int64_t n, int64_t k, const Operand<T>& a, const Operand<T>& b,
         const gemm_tiles::Work& work, const Epilogue& epilogue) {
  const int64_t blocks = std::min<int64_t>(work.items(), multiprocessors(device));
  launch(gemm_sm90_kernel<T, a_along, b_along, Epilogue>, static_cast<unsigned>(blocks), kThreads,
         kShared, stream_of(device), map_of<a_along>(a, m, k, kM), map_of<b_along>(b, n, k, kN),
         work, epilogue);
}

}  // namespace p2r::cuda::gemm_sm90

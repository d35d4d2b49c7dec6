// The device functions of Hopper's GEMM: where TMA writes the tiles of an operand of either major,
// and the descriptors that wgmma reads them by.
#include <cstring>

#include "cuda/gemm/wgmma.cuh"
#include "test/twin/hopper/checks.h"

namespace hopper {
namespace {

constexpr uint32_t kTile = 5120;  // the base of the tables' tiles

template <Major major, int Across>
__global__ void fill_tile(const __grid_constant__ TensorMap map, uint16_t* out) {
  SMEM_DYN(dynamic);
  SMEM_ARRAY(uint64_t, bars, 1);
  const uint32_t bar = ptx::smem_u32(bars);
  if (threadIdx.x == 0) {
    ptx::mbar_init(bar, 1);
    ptx::mbar_fence_init();
    ptx::mbar_arrive_expect_tx(bar, Across * gemm_wgmma::kK * 2);
    gemm_wgmma::load_tile<major, Across>(kTile, map, bar, Across, gemm_wgmma::kK);
  }
  __syncthreads();
  ptx::mbar_wait(bar, 0);
  for (int i = threadIdx.x; i < Across * gemm_wgmma::kK; i += 128)
    memcpy(&out[i], at_address(dynamic, kTile) + 2 * i, 2);
}

template <Major major, int Across>
void check_operand(const Tables& tables, Checks& checks, const char* id) {
  constexpr int kK = gemm_wgmma::kK;
  const Form& form = tables.form(id);
  // The second tile of both axes, which the operand ends within.
  constexpr int across = 2 * Across - 24, k = 2 * kK - 8;
  constexpr int line = major == Major::k ? k : across, lines = major == Major::k ? across : k;
  Codes x(size_t(line * lines), [](size_t i) { return i * 7 + 1; });
  std::vector<uint16_t> out(size_t(Across * kK));
  Group& group = checks["gemm_wgmma tiles"];
  run(group, fill_tile<major, Across>, 128,
      gemm_wgmma::operand_map<major>(Operand<bf16>{x.as_bf16(), line}, across, k, Across),
      out.data());
  for (int mn = 0; mn < Across; ++mn)
    for (int i = 0; i < kK; ++i) {
      const int row = Across + mn, column = kK + i;
      const size_t at = size_t(major == Major::k ? row * line + column : column * line + row);
      const int want = row < across && column < k ? x.data()[at] : 0;
      group.expect(out[(form.address(mn, i) - kTile) / 2] == want, "%s mn %d k %d", id, mn, i);
    }
  for (int part = 0; part < kK / 16; ++part)
    for (size_t sub = 0; sub < form.descriptors.size(); ++sub)
      expect_descriptor(
          checks["gemm_wgmma descriptors"], form,
          gemm_wgmma::smem_descriptor<major>(kTile + uint32_t(sub) * gemm_wgmma::kBoxBytes, part),
          form.descriptors[sub][size_t(part)]);
}

}  // namespace

void check_gemm(const Tables& tables, Checks& checks) {
  check_operand<Major::k, 128>(tables, checks, "a_k_128x64");
  check_operand<Major::mn, 128>(tables, checks, "a_mn_128x64");
  check_operand<Major::k, 256>(tables, checks, "b_k_256x64_n256");
  check_operand<Major::mn, 256>(tables, checks, "b_mn_256x64_n256");
}

}  // namespace hopper

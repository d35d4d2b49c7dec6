// Ranges of the hardware (rules.json): the twin and make_tensor_map have to accept both ends and to
// reject what is beyond.
#include "cuda/attention/wgmma.cuh"
#include "test/twin/hopper/checks.h"

namespace hopper {
namespace {

// Whether the twin, or a check of the arguments, lets the work be.
template <class F>
bool accepted(F work) {
  try {
    work();
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

__global__ void arm(int arrivals, int bytes) {
  SMEM_ARRAY(uint64_t, bar, 1);
  ptx::mbar_init(ptx::smem_u32(bar), arrivals);
  ptx::mbar_expect_tx(ptx::smem_u32(bar), bytes);
}

void check_mbarriers(const Json& rules, Group& group) {
  const auto takes = [](int arrivals, int bytes) {
    return accepted([=] { launch(arm, 1, 1, 0, nullptr, arrivals, bytes); });
  };
  const int fewest = rules["arrivals"][0], most = rules["arrivals"][1];
  group.expect(takes(fewest, 0) && !takes(fewest - 1, 0), "fewest arrivals: %d", fewest);
  group.expect(takes(most, 0) && !takes(most + 1, 0), "most arrivals: %d", most);
  const int bytes = rules["tx"][1];
  group.expect(takes(1, bytes) && !takes(1, bytes + 1), "most bytes: %d", bytes);
}

void check_tensor_maps(const Json& rules, Group& group) {
  Codes x(64, [](size_t) { return 0; });
  // Rows of `inner` elements, `stride` bytes apart.
  const auto takes = [&](uint64_t stride, uint32_t inner, uint32_t rows, Swizzle swizzle) {
    return accepted([&] {
      make_tensor_map<bf16, 2>(x.as_bf16(), {1024, 1024}, {stride}, {inner, rows}, swizzle);
    });
  };
  const uint32_t fewest = uint32_t(int(rules["box"][0])), most = uint32_t(int(rules["box"][1]));
  group.expect(takes(2048, 8, fewest, Swizzle::none) && !takes(2048, 8, fewest - 1, Swizzle::none),
               "smallest box: %u", fewest);
  group.expect(takes(2048, 8, most, Swizzle::none) && !takes(2048, 8, most + 1, Swizzle::none),
               "largest box: %u", most);
  const uint64_t step = uint64_t(int(rules["stride_multiple"]));
  const uint64_t limit = uint64_t{1} << int(rules["stride_below_log2"]);
  group.expect(takes(limit - step, 8, 8, Swizzle::none) && !takes(limit, 8, 8, Swizzle::none),
               "strides below %llu", static_cast<unsigned long long>(limit));
  group.expect(!takes(2048 + step / 2, 8, 8, Swizzle::none), "strides of %d", int(step));
  const uint32_t inner = uint32_t(int(rules["inner_bytes_multiple"]));
  group.expect(!takes(2048, inner / 4, 8, Swizzle::none), "rows of %u bytes", inner / 2);
  for (const auto& [name, bytes] : rules["inner_bytes_at_most"].fields) {
    const uint32_t row = uint32_t(int(bytes)) / 2;
    const Swizzle swizzle = row == 64 ? Swizzle::b128 : row == 32 ? Swizzle::b64 : Swizzle::b32;
    group.expect(takes(2048, row, 8, swizzle) && !takes(2048, row + inner / 2, 8, swizzle),
                 "rows under a swizzle of %s", name.c_str());
  }
}

template <int N>
__global__ void multiply_columns() {
  SMEM_DYN(dynamic);
  for (int i = threadIdx.x; i < 4096; i += 128) reinterpret_cast<int*>(dynamic)[i] = 0;
  ptx::fence_proxy_async();
  __syncthreads();
  float d[N / 2];
  uint32_t a[4] = {};
  ptx::wgmma_fence();
  ptx::wgmma_rs<bf16, N>(d, a, ptx::matrix_desc(ptx::smem_u32(dynamic), 0, 256, Swizzle::b32),
                         false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
}
template <int N>
bool takes_columns() {
  return accepted([] { launch(multiply_columns<N>, 1, 128, 16 * 1024, nullptr); });
}

// The first of `groups` warpgroups gives registers to the others.
template <int Loader, int Others>
__global__ void move_registers() {
  if (threadIdx.x < 128)
    ptx::reg_dealloc<Loader>();
  else
    ptx::reg_alloc<Others>();
}
template <int Loader, int Others>
void check_registers(const Json& rules, int threads, Group& group) {
  const auto takes = [=](auto kernel) {
    return accepted([&] { launch(kernel, 1, unsigned(threads), 0, nullptr); });
  };
  bool known = false;
  for (const Json& entry : rules["launches"].entries)
    known = known ||
            (entry["threads"] == threads && entry["loader"] == Loader && entry["others"] == Others);
  group.expect(known, "%d threads: %d and %d registers", threads, Loader, Others);
  group.expect(takes(move_registers<Loader, Others>) && !takes(move_registers<Loader, Others + 8>),
               "%d threads: the pool of %d and %d registers", threads, Loader, Others);
}

}  // namespace

void check_rules(const Tables& tables, Checks& checks) {
  const Json& rules = tables.rules;
  check_mbarriers(rules["mbarrier"], checks["rules: mbarriers"]);
  check_tensor_maps(rules["tma"], checks["rules: tensor maps"]);
  Group& columns = checks["rules: wgmma"];
  columns.expect(rules["wgmma"]["n"][0] == 8 && rules["wgmma"]["n"][1] == 256 &&
                     rules["wgmma"]["n_multiple"] == 8,
                 "N");
  columns.expect(takes_columns<8>() && !takes_columns<4>(), "fewest columns");
  columns.expect(takes_columns<256>() && !takes_columns<264>(), "most columns");
  columns.expect(!takes_columns<12>(), "columns of a multiple of 4");
  Group& registers = checks["rules: setmaxnreg"];
  using attention_wgmma::Roles;
  check_registers<Roles<2>::producer_registers, Roles<2>::consumer_registers>(
      rules["setmaxnreg"], Roles<2>::threads, registers);
  check_registers<Roles<3>::producer_registers, Roles<3>::consumer_registers>(
      rules["setmaxnreg"], Roles<3>::threads, registers);
  check_registers<24, 240>(rules["setmaxnreg"], 384, registers);
}

}  // namespace hopper

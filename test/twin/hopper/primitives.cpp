// The primitives of cuda/ptx.cuh: the fragments of ldmatrix, mma and wgmma, the addresses that
// wgmma reads by a descriptor, and those that TMA writes. On the twin, and on a device
// (device_main.cpp).
#include <array>
#include <cstring>

#include "cuda/tensor_map.cuh"
#include "test/twin/hopper/checks.h"

namespace hopper {
namespace {

// ---- fragments ----
template <int Count, bool Transposed>
__global__ void ldmatrix_kernel(uint32_t* out) {
  SMEM_DYN(bytes);
  const int lane = threadIdx.x;
  for (int e = 0; e < 8; ++e)
    reinterpret_cast<uint16_t*>(bytes)[lane * 8 + e] = uint16_t(lane * 8 + e);
  __syncwarp();
  uint32_t r[Count];
  const uint32_t row = ptx::smem_u32(bytes) + 16 * lane;
  if constexpr (Count == 2)
    ptx::ldmatrix_x2<Transposed>(r, row);
  else
    ptx::ldmatrix_x4<Transposed>(r, row);
  for (int i = 0; i < Count; ++i) out[lane * Count + i] = r[i];
}

template <int Count, bool Transposed>
void check_ldmatrix(const Tables& tables, const char* name, Group& group) {
  Array<uint32_t> out(32 * Count);
  run(group, ldmatrix_kernel<Count, Transposed>, 32, out.data());
  for (int lane = 0; lane < 32; ++lane)
    for (int v = 0; v < 2 * Count; ++v) {
      const int got = out[size_t(lane * Count + v / 2)] >> (16 * (v % 2)) & 0xFFFF;
      const int want = tables.fragments["ldmatrix"][name][size_t(lane)][size_t(v)];
      group.expect(got == want, "%s lane %d value %d: %d, CuTe has %d", name, lane, v, got, want);
    }
}

template <class T>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, float* d) {
  uint32_t ra[4], rb[2];
  float rd[4] = {};
  for (int i = 0; i < 4; ++i) ra[i] = a[threadIdx.x * 4 + i];
  for (int i = 0; i < 2; ++i) rb[i] = b[threadIdx.x * 2 + i];
  ptx::mma_m16n8k16<T>(rd, ra, rb);
  for (int i = 0; i < 4; ++i) d[threadIdx.x * 4 + i] = rd[i];
}

// A of one 1 at a time, by a B whose entries all differ: row m of the product is row k of B.
template <class T>
void check_mma(const Tables& tables, Group& group) {
  const Json& fragments = tables.fragments["mma_m16n8k16"];
  Codes a(32 * 8, [](size_t) { return 0; });
  Codes b(32 * 4, [&](size_t i) {
    const int at = fragments["b"][i / 4][i % 4];
    return bits_of<T>(float(at % 16 * 8 + at / 16 + 1));
  });
  for (size_t i = 0; i < 32 * 8; ++i) {
    a.data()[i] = bits_of<T>(1);
    Array<float> d(128);
    run(group, mma_kernel<T>, 32, reinterpret_cast<const uint32_t*>(a.data()),
        reinterpret_cast<const uint32_t*>(b.data()), d.data());
    a.data()[i] = 0;
    const int at = fragments["a"][i / 8][i % 8], m = at / 16, k = at % 16;
    for (size_t j = 0; j < 128; ++j) {
      const int c = fragments["c"][j / 4][j % 4];
      group.expect(d[j] == (c / 8 == m ? float(k * 8 + c % 8 + 1) : 0), "A's lane %d value %d",
                   int(i / 8), int(i % 8));
    }
  }
}

// ---- wgmma ----
// Each element of a tile holds the low or the high byte of half of its offset, which is exact in
// bf16 and f16: so a product by an identity says which byte was read.
template <class T>
__device__ void write_offsets(unsigned char* tile, int bytes, bool high) {
  for (int e = threadIdx.x; e < bytes / 2; e += 128) {
    const T value = T(float(high ? e / 256 : e % 256));
    memcpy(tile + 2 * e, &value, 2);
  }
}

// D = A B, with A from registers.
template <class T, int N, bool BMnMajor>
__global__ void read_b(uint64_t desc, uint32_t tile, int bytes, bool high, const uint32_t* a,
                       float* out) {
  SMEM_DYN(dynamic);
  write_offsets<T>(at_address(dynamic, tile), bytes, high);
  ptx::fence_proxy_async();
  __syncthreads();
  float d[N / 2];
  uint32_t r[4];
  for (int i = 0; i < 4; ++i) r[i] = a[threadIdx.x * 4 + i];
  ptx::wgmma_fence();
  ptx::wgmma_rs<T, N, BMnMajor>(d, r, desc, false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) out[threadIdx.x * (N / 2) + i] = d[i];
}

// D = A I, with a 16 x 16 identity in shared memory: entry i at b[i].
template <class T, bool AMnMajor>
__global__ void read_a(uint64_t desc, uint32_t tile, int bytes, bool high, uint64_t b_desc,
                       const uint32_t* b, float* out) {
  SMEM_DYN(dynamic);
  write_offsets<T>(at_address(dynamic, tile), bytes, high);
  for (int i = threadIdx.x; i < 256; i += 128) {
    const T value = T(float(i % 16 == i / 16));
    memcpy(at_address(dynamic, b[i]), &value, 2);
  }
  ptx::fence_proxy_async();
  __syncthreads();
  float d[8];
  ptx::wgmma_fence();
  ptx::wgmma_ss<T, 16, AMnMajor, false>(d, desc, b_desc, false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < 8; ++i) out[threadIdx.x * 8 + i] = d[i];
}

struct Entry {
  int m, n;
};
Entry accumulator(const Tables& tables, int thread, int i) {
  const int at = tables.fragments["wgmma"]["d"][size_t(thread)][size_t(i)];
  return {at / 256, at % 256};
}

// read(high, out) for both bytes; then the byte that each accumulator of width n was read from.
template <class F>
std::vector<uint32_t> bytes_read(const Form& form, int n, F read) {
  Array<float> low(size_t(64 * n)), high(size_t(64 * n));
  read(false, low.data());
  read(true, high.data());
  std::vector<uint32_t> address(low.size());
  for (size_t i = 0; i < address.size(); ++i)
    address[i] = form.base + 2 * uint32_t(low[i] + 256 * high[i]);
  return address;
}

template <class T, int N, bool MnMajor>
void check_b(const Tables& tables, const Form& form, Group& group) {
  // The identity of 16, four times.
  Codes a(128 * 8, [&](size_t i) {
    const int at = tables.fragments["wgmma"]["a"][i / 8][i % 8];
    return bits_of<T>(float(at / 16 % 16 == at % 16));
  });
  for (size_t sub = 0; sub < form.descriptors.size(); ++sub)
    for (int step = 0; step < form.steps(); ++step) {
      const auto got = bytes_read(form, N, [&](bool high, float* out) {
        run(group, read_b<T, N, MnMajor>, 128, form.descriptors[sub][size_t(step)], form.base,
            form.bytes, high, reinterpret_cast<const uint32_t*>(a.data()), out);
      });
      for (int i = 0; i < 64 * N; ++i) {
        const auto [m, n] = accumulator(tables, i / (N / 2), i % (N / 2));
        const uint32_t want = form.address(int(sub) * form.rows_apart() + n, step * 16 + m % 16);
        group.expect(got[size_t(i)] == want, "%s rows %d step %d n %d k %d: byte %u, CuTe has %u",
                     form.id.c_str(), int(sub), step, n, m % 16, got[size_t(i)], want);
      }
    }
}

template <class T, bool MnMajor>
void check_a(const Tables& tables, const Form& form, Group& group) {
  Form identity = tables.form("b_k_64x16_none");
  const uint64_t moved = (form.base + uint32_t(form.bytes) + 1023) / 1024 * 1024;
  const uint64_t b_desc = identity.descriptors[0][0] + (moved - identity.base) / 16;
  identity.base = uint32_t(moved);
  Array<uint32_t> b(256);
  for (int i = 0; i < 256; ++i) b[size_t(i)] = identity.address(i / 16, i % 16);
  for (size_t sub = 0; sub < form.descriptors.size(); ++sub)
    for (int step = 0; step < form.steps(); ++step) {
      const auto got = bytes_read(form, 16, [&](bool high, float* out) {
        run(group, read_a<T, MnMajor>, 128, form.descriptors[sub][size_t(step)], form.base,
            form.bytes, high, b_desc, b.data(), out);
      });
      for (int i = 0; i < 64 * 16; ++i) {
        const auto [m, k] = accumulator(tables, i / 8, i % 8);
        const uint32_t want = form.address(int(sub) * 64 + m, step * 16 + k);
        group.expect(got[size_t(i)] == want, "%s rows %d step %d m %d k %d: byte %u, CuTe has %u",
                     form.id.c_str(), int(sub), step, m, k, got[size_t(i)], want);
      }
    }
}

// The accumulators of every width, by an A of small integers.
template <class T, int N>
void check_width(const Tables& tables, Group& group) {
  const Form& form = tables.form("b_mn_256x16_n256");
  float entry[64][16];
  uint32_t random = 7;
  Codes a(128 * 8, [&](size_t i) {
    const int at = tables.fragments["wgmma"]["a"][i / 8][i % 8];
    random = random * 1664525 + 1013904223;
    return bits_of<T>(entry[at / 16][at % 16] = float(int(random >> 10) % 15 - 7));
  });
  Array<float> out(64 * N);
  run(group, read_b<T, N, true>, 128, form.descriptors[0][0], form.base, form.bytes, false,
      reinterpret_cast<const uint32_t*>(a.data()), out.data());
  for (int i = 0; i < 64 * N; ++i) {
    const auto [m, n] = accumulator(tables, i / (N / 2), i % (N / 2));
    float want = 0;
    for (int k = 0; k < 16; ++k)
      want += entry[m][k] * float((form.address(n, k) - form.base) / 2 % 256);
    group.expect(n < N && out[size_t(i)] == want, "N %d thread %d accumulator %d", N, i / (N / 2),
                 i % (N / 2));
  }
}

// Calls f with the columns of a B, as a constant.
template <class F>
void with_columns(int n, Group& group, F f) {
  const auto each = [&](auto... columns) {
    return ((n == columns.value ? (f(columns), true) : false) || ...);
  };
  using std::integral_constant;
  if (!each(integral_constant<int, 64>(), integral_constant<int, 72>(),
            integral_constant<int, 80>(), integral_constant<int, 96>(),
            integral_constant<int, 128>(), integral_constant<int, 160>(),
            integral_constant<int, 256>()))
    group.expect(false, "no check of a B of %d columns", n);
}

template <class T>
void check_form(const Tables& tables, const Form& form, Group& group) {
  if (form.is_a && form.mn_major)
    check_a<T, true>(tables, form, group);
  else if (form.is_a)
    check_a<T, false>(tables, form, group);
  else
    with_columns(form.instruction_mn, group, [&](auto n) {
      if (form.mn_major)
        check_b<T, n.value, true>(tables, form, group);
      else
        check_b<T, n.value, false>(tables, form, group);
    });
}

// ---- TMA ----
Swizzle swizzle_of(int row_bytes) {
  return row_bytes == 128  ? Swizzle::b128
         : row_bytes == 64 ? Swizzle::b64
         : row_bytes == 32 ? Swizzle::b32
                           : Swizzle::none;
}

// `boxes` boxes behind each other, `inner` elements apart in the tensor.
__global__ void load_boxes(const __grid_constant__ TensorMap map, int boxes, int inner,
                           uint32_t tile, int box_bytes, uint16_t* out) {
  SMEM_DYN(dynamic);
  SMEM_ARRAY(uint64_t, bars, 1);
  const uint32_t bar = ptx::smem_u32(bars);
  if (threadIdx.x == 0) {
    ptx::mbar_init(bar, 1);
    ptx::mbar_fence_init();
    ptx::mbar_arrive_expect_tx(bar, box_bytes * boxes);
    for (int i = 0; i < boxes; ++i)
      ptx::tma_load(tile + uint32_t(i * box_bytes), map, bar, {i * inner, 0});
  }
  __syncthreads();
  ptx::mbar_wait(bar, 0);
  for (int i = threadIdx.x; i < box_bytes * boxes / 2; i += 128)
    memcpy(&out[i], at_address(dynamic, tile) + 2 * i, 2);
}

void check_tile(const Form& form, Group& group) {
  if (form.tma_box.empty()) return;
  const int inner = form.mn_major ? form.tile_mn : form.tile_k;
  const int lines = form.mn_major ? form.tile_k : form.tile_mn;
  const int box_inner = form.tma_box[0], box_lines = form.tma_box[1];
  Codes x(size_t(inner * lines), [](size_t i) { return i; });
  const auto map = make_tensor_map<bf16, 2>(
      x.as_bf16(), {uint64_t(inner), uint64_t(lines)}, {uint64_t(inner) * 2},
      {uint32_t(box_inner), uint32_t(box_lines)}, swizzle_of(form.swizzle));
  Array<uint16_t> out(size_t(form.bytes) / 2);
  run(group, load_boxes, 128, map, inner / box_inner, box_inner, form.base,
      box_inner * box_lines * 2, out.data());
  for (int mn = 0; mn < form.tile_mn; ++mn)
    for (int k = 0; k < form.tile_k; ++k) {
      const int want = form.mn_major ? k * inner + mn : mn * inner + k;
      const uint32_t at = form.address(mn, k);
      group.expect(out[(at - form.base) / 2] == want, "%s mn %d k %d at byte %u", form.id.c_str(),
                   mn, k, at);
    }
}

void check_swizzle(const Tables& tables, Group& group) {
  for (const auto& [name, mode] : tables.swizzle["modes"].fields) {
    const int row = mode["row_bytes"];
    const Swizzle swizzle = swizzle_of(row);
    const uint64_t desc = ptx::matrix_desc(0, 0, 0, swizzle);
    group.expect(int(desc >> 62) == mode["wgmma_layout_type"], "layout type of %s", name.c_str());
    // 1024 bytes whose 16-byte chunks are numbered.
    Codes x(512, [](size_t i) { return i / 8; });
    const auto map = make_tensor_map<bf16, 2>(
        x.as_bf16(), {uint64_t(row / 2), uint64_t(1024 / row)}, {uint64_t(row)},
        {uint32_t(row / 2), uint32_t(1024 / row)}, swizzle);
    Array<uint16_t> out(512);
    run(group, load_boxes, 128, map, 1, 0, 5120u, 1024, out.data());
    for (int c = 0; c < 64; ++c)
      group.expect(out[size_t(8 * mode["chunks"][size_t(c)])] == c, "%s chunk %d", name.c_str(), c);
  }
}

// ---- descriptors ----
void check_fields(const Tables& tables, Group& group) {
  constexpr uint32_t all = ~15u;
  const std::map<std::string, uint64_t> written = {
      {"start", ptx::matrix_desc(all, 0, 0, Swizzle::none)},
      {"leading", ptx::matrix_desc(0, all, 0, Swizzle::none)},
      {"stride", ptx::matrix_desc(0, 0, all, Swizzle::none)},
      {"layout_type", ptx::matrix_desc(0, 0, 0, Swizzle::b32)}};
  for (const auto& [name, desc] : written) {
    const Json& field = tables.descriptors["fields"][name];
    group.expect(desc == ((uint64_t{1} << field[1]) - 1) << field[0], "%s", name.c_str());
  }
  for (const Json& start : tables.descriptors["starts"].entries) {
    const uint64_t desc = ptx::matrix_desc(uint32_t(int(start[0])), 0, 1024, Swizzle::b128);
    group.expect(int(desc & 0x3FFF) == start[1], "start of %d", int(start[0]));
  }
}

}  // namespace

void check_primitives(const Tables& tables, Checks& checks) {
  check_fields(tables, checks["descriptor fields"]);
  check_swizzle(tables, checks["swizzles"]);
  Group& ldmatrix = checks["ldmatrix"];
  check_ldmatrix<2, false>(tables, "x2", ldmatrix);
  check_ldmatrix<4, false>(tables, "x4", ldmatrix);
  check_ldmatrix<2, true>(tables, "x2_trans", ldmatrix);
  check_ldmatrix<4, true>(tables, "x4_trans", ldmatrix);
  check_mma<bf16>(tables, checks["mma, bf16"]);
  check_mma<__half>(tables, checks["mma, f16"]);
  Group& widths = checks["wgmma accumulators"];
  check_width<bf16, 8>(tables, widths);
  check_width<bf16, 72>(tables, widths);
  check_width<bf16, 256>(tables, widths);
  check_width<__half, 80>(tables, widths);
  check_width<__half, 160>(tables, widths);
  for (const auto& [id, form] : tables.forms) {
    check_tile(form, checks["TMA tiles"]);
    check_form<bf16>(tables, form, checks["wgmma operands, bf16"]);
    check_form<__half>(tables, form, checks["wgmma operands, f16"]);
  }
}

}  // namespace hopper

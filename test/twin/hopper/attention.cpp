// The device functions of Hopper's attention kernels: the descriptors of their products, the tiles
// in shared memory that TMA and threads write for these, and what threads do with fragments.
#include <cstring>

#include "cuda/attention/wgmma_one_pass.cuh"
#include "test/twin/hopper/checks.h"
#include "test/twin/simt.h"

namespace hopper {
namespace {

using namespace p2r::cuda::attention_wgmma;

// ---- descriptors of products ----
struct Issued {
  simt::Wgmma op;
  bool a_in_registers;
};

__device__ void clear_memory(unsigned char* dynamic) {
  for (int i = threadIdx.x; i < 220 * 1024 / 16; i += 128)
    reinterpret_cast<uint4*>(dynamic)[i] = make_uint4(0, 0, 0, 0);
  ptx::fence_proxy_async();
  __syncthreads();
}

template <int D, int ARows, int N, int BRows>
__global__ void issue_gemm_ss(uint32_t a, uint32_t b) {
  SMEM_DYN(dynamic);
  clear_memory(dynamic);
  float s[N / 2];
  ptx::wgmma_fence();
  gemm_ss<bf16, D, ARows, N, BRows>(s, a, b);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
}

template <int D, int K>
__global__ void issue_gemm_rs(uint32_t x) {
  SMEM_DYN(dynamic);
  clear_memory(dynamic);
  float sums[D / 2] = {};
  uint32_t p[K / 16][4] = {};
  ptx::wgmma_fence();
  gemm_rs<bf16, D, K>(sums, p, x);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
}

template <int D, int Width>
__global__ void issue_gemm_dq(uint32_t ds_tile, uint32_t keys) {
  SMEM_DYN(dynamic);
  clear_memory(dynamic);
  float dq[Width / 2];
  ptx::wgmma_fence();
  gemm_dq<bf16, D, Width>(dq, ds_tile, keys);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
}

class Attention {
 public:
  Attention(const Tables& tables, Checks& checks) : tables_(tables), checks_(checks) {}

  // S = A B^T, 64 rows of the tile `a` by N of `b`'s rows at a time.
  template <int D, int ARows, int N, int BRows = N>
  void ss(const char* a, const char* b) {
    const Form &in_a = tables_.form(a), &in_b = tables_.form(b);
    Group& group = checks_["gemm_ss, D " + std::to_string(D)];
    for (int i = 0; i < ARows / 64; ++i)
      for (int j = 0; j < BRows / N; ++j) {
        const auto issued = record(group, issue_gemm_ss<D, ARows, N, BRows>,
                                   in_a.base + uint32_t(i * 64 * Panels<D>::row_bytes),
                                   in_b.base + uint32_t(j * N * Panels<D>::row_bytes));
        expect_products(group, issued, &in_a, i, in_b, j);
      }
  }

  // O += P X, P in registers.
  template <int D, int K>
  void rs(const char* b) {
    const Form& in_b = tables_.form(b);
    Group& group = checks_["gemm_rs, D " + std::to_string(D)];
    expect_products(group, record(group, issue_gemm_rs<D, K>, in_b.base), nullptr, 0, in_b, 0);
  }

  // dQ = dS K: panel i of dS^T by the columns from Width * j on.
  template <int D, int Width>
  void dq(const char* a, int i, const char* b, int j) {
    const Form &in_a = tables_.form(a), &in_b = tables_.form(b);
    Group& group = checks_["gemm_dq, D " + std::to_string(D)];
    const auto issued =
        record(group, issue_gemm_dq<D, Width>, in_a.base + uint32_t(i * kOwned * 128),
               in_b.base + uint32_t(j * kOwned * Panels<D>::row_bytes));
    expect_products(group, issued, &in_a, i, in_b, j);
  }

  // Whether load_rows, and for owned tiles copy_rows, put Rows rows of a head where the forms have
  // them: as a K-major operand and, if it is used as one, an MN-major one.
  template <int D, int Rows>
  void tile(const char* as_k, const char* as_mn = nullptr);

  // Whether store_ds puts dS^T of N queries where the form has it.
  template <int N>
  void ds(const char* a);

  // Fragments of 64 rows of N columns, and of D columns.
  template <int N>
  void pack();
  template <int N>
  void zero();
  template <int D>
  void partner();

 private:
  template <class... P, class... A>
  std::vector<Issued> record(Group& group, void (*kernel)(P...), A... args) {
    std::vector<Issued> issued;
    simt::options().on_wgmma = [&](const simt::Wgmma& op, bool a_in_registers, int warp) {
      if (warp == 0) issued.push_back({op, a_in_registers});
    };
    run(group, kernel, 128, args...);
    simt::options().on_wgmma = nullptr;
    return issued;
  }

  static void expect_products(Group& group, const std::vector<Issued>& issued, const Form* a,
                              int a_sub, const Form& b, int b_sub) {
    group.expect(int(issued.size()) == b.steps(), "%s: %d products", b.id.c_str(),
                 int(issued.size()));
    for (size_t k = 0; k < issued.size() && int(k) < b.steps(); ++k) {
      const simt::Wgmma& op = issued[k].op;
      group.expect(op.n == b.instruction_mn && op.b_mn_major == b.mn_major &&
                       issued[k].a_in_registers == !a && (!a || op.a_mn_major == a->mn_major),
                   "%s: N or the majors", b.id.c_str());
      if (a) expect_descriptor(group, *a, op.a_desc, a->descriptors[size_t(a_sub)][k]);
      expect_descriptor(group, b, op.b_desc, b.descriptors[size_t(b_sub)][k]);
    }
  }

  // Where wgmma's A in registers and its accumulators have value v of a thread.
  int a_at(int thread, int v) const {
    return tables_.fragments["wgmma"]["a"][size_t(thread)][size_t(v)];
  }
  int d_at(int thread, int i) const {
    return tables_.fragments["wgmma"]["d"][size_t(thread)][size_t(i)];
  }

  const Tables& tables_;
  Checks& checks_;
};

// ---- where tiles are stored ----
constexpr uint32_t kTile = 5120;  // the base of the tables' tiles

template <int D, int Rows>
__global__ void fill_rows(const __grid_constant__ TensorMap map, uint16_t* out) {
  SMEM_DYN(dynamic);
  SMEM_ARRAY(uint64_t, bars, 1);
  const uint32_t bar = ptx::smem_u32(bars);
  if (threadIdx.x == 0) {
    ptx::mbar_init(bar, 1);
    ptx::mbar_fence_init();
    ptx::mbar_arrive_expect_tx(bar, Panels<D>::bytes(Rows));
    load_rows<D, Rows>(kTile, map, bar, 1, 3);
  }
  __syncthreads();
  ptx::mbar_wait(bar, 0);
  for (int i = threadIdx.x; i < Panels<D>::bytes(Rows) / 2; i += 128)
    memcpy(&out[i], at_address(dynamic, kTile) + 2 * i, 2);
}

template <int D>
__global__ void copy_owned(const bf16* x, int64_t row, int inside, uint16_t* out) {
  SMEM_DYN(dynamic);
  if (threadIdx.x < 32) copy_rows<D>(kTile, x, row, inside);
  __syncthreads();
  for (int i = threadIdx.x; i < Panels<D>::bytes(kOwned) / 2; i += 128)
    memcpy(&out[i], at_address(dynamic, kTile) + 2 * i, 2);
}

template <int D, int Rows>
void Attention::tile(const char* as_k, const char* as_mn) {
  // [token][head][column]; the rows of head 1 from token 3.
  constexpr int heads = 2, tokens = Rows + 5, first = (3 * heads + 1) * D;
  Codes x(size_t(tokens * heads * D), [](size_t i) { return i; });
  std::vector<uint16_t> out(size_t(Panels<D>::bytes(Rows)) / 2);
  const auto expect_rows = [&](Group& group, const char* id, int inside) {
    const Form& form = tables_.form(id);
    for (int r = 0; r < Rows; ++r)
      for (int c = 0; c < (form.mn_major ? form.tile_mn : form.tile_k); ++c) {
        const uint32_t at = form.mn_major ? form.address(c, r) : form.address(r, c);
        const bool there = r < inside && c < D;
        group.expect(out[(at - kTile) / 2] == (there ? uint16_t(first + r * heads * D + c) : 0),
                     "%s row %d column %d at byte %u", id, r, c, at);
      }
  };
  Group& loaded = checks_["load_rows, D " + std::to_string(D)];
  run(loaded, fill_rows<D, Rows>, 128,
      attention_map<bf16, D, Rows>(x.as_bf16(), heads * D, tokens, heads), out.data());
  expect_rows(loaded, as_k, Rows);
  if (as_mn) expect_rows(loaded, as_mn, Rows);
  if constexpr (Rows == kOwned) {
    constexpr int inside = 77;
    Group& copied = checks_["copy_rows, D " + std::to_string(D)];
    run(copied, copy_owned<D>, 128, x.as_bf16() + first, int64_t{heads * D}, inside, out.data());
    expect_rows(copied, as_k, inside);
  }
}

template <int N>
__global__ void write_ds(const uint32_t* w, uint16_t* out) {
  SMEM_DYN(dynamic);
  uint32_t r[N / 16][4];
  for (int k = 0; k < N / 16; ++k)
    for (int i = 0; i < 4; ++i) r[k][i] = w[(threadIdx.x * (N / 16) + k) * 4 + i];
  store_ds<N>(at_address(dynamic, kTile), r);
  __syncthreads();
  for (int i = threadIdx.x; i < kOwned * N; i += 2 * 128)
    memcpy(&out[i], at_address(dynamic, kTile) + 2 * i, 2);
}

template <int N>
void Attention::ds(const char* a) {
  const Form& form = tables_.form(a);
  const auto code = [](int key, int query) { return uint16_t(key * 128 + query); };
  // Two warpgroups of 64 keys, who hold them as wgmma's A.
  Codes w(size_t(2 * 128 * N / 2), [&](size_t i) {
    const int thread = int(i) / (N / 2), k = int(i) % (N / 2) / 8, at = a_at(thread % 128, i % 8);
    return code(thread / 128 * 64 + at / 16, 16 * k + at % 16);
  });
  std::vector<uint16_t> out(kOwned * N);
  Group& group = checks_["store_ds"];
  run(group, write_ds<N>, 2 * 128, reinterpret_cast<const uint32_t*>(w.data()), out.data());
  for (int key = 0; key < kOwned; ++key)
    for (int query = 0; query < N; ++query)
      group.expect(out[(form.address(query, key) - kTile) / 2] == code(key, query),
                   "%d queries: key %d query %d", N, key, query);
}

// ---- fragments ----
template <int N>
__global__ void pack_fragments(const float* in, uint32_t* out) {
  float s[N / 2];
  uint32_t w[N / 16][4];
  for (int i = 0; i < N / 2; ++i) s[i] = in[threadIdx.x * (N / 2) + i];
  pack_operand<bf16, N>(w, s);
  for (int k = 0; k < N / 16; ++k)
    for (int i = 0; i < 4; ++i) out[(threadIdx.x * (N / 16) + k) * 4 + i] = w[k][i];
}

// Rows and columns apart: both are small integers.
template <int N>
void Attention::pack() {
  Group& group = checks_["pack_operand"];
  for (const bool rows : {false, true}) {
    std::vector<float> in(64 * N);
    std::vector<uint16_t> out(64 * N);
    for (int i = 0; i < 64 * N; ++i) {
      const int at = d_at(i / (N / 2), i % (N / 2));
      in[size_t(i)] = float(rows ? at / 256 : at % 256);
    }
    run(group, pack_fragments<N>, 128, in.data(), reinterpret_cast<uint32_t*>(out.data()));
    for (int i = 0; i < 64 * N; ++i) {
      const int thread = i / (N / 2), k = i % (N / 2) / 8, at = a_at(thread, i % 8);
      group.expect(out[size_t(i)] == bits_of<bf16>(float(rows ? at / 16 : 16 * k + at % 16)),
                   "N %d thread %d k %d value %d", N, thread, k, i % 8);
    }
  }
}

template <int N>
__global__ void zero_fragments(int inside, uint32_t* out) {
  uint32_t w[N / 16][4];
  for (auto& k : w)
    for (uint32_t& pair : k) pair = ~0u;
  zero_rows<N>(w, inside);
  for (int k = 0; k < N / 16; ++k)
    for (int i = 0; i < 4; ++i) out[(threadIdx.x * (N / 16) + k) * 4 + i] = w[k][i];
}

template <int N>
void Attention::zero() {
  Group& group = checks_["zero_rows"];
  for (const int inside : {0, 1, 7, 8, 9, 31, 33, 63}) {
    std::vector<uint32_t> out(128 * N / 4);
    run(group, zero_fragments<N>, 128, inside, out.data());
    for (int i = 0; i < 64 * N; ++i) {
      const int thread = i / (N / 2), at = a_at(thread, i % 8);
      group.expect((out[size_t(i / 2)] != 0) == (at / 16 < inside), "%d inside, thread %d", inside,
                   thread);
    }
  }
}

template <int D>
__global__ void take_partners(const float* in, float* out) {
  float sums[D / 2];
  for (int i = 0; i < D / 2; ++i) sums[i] = in[threadIdx.x * (D / 2) + i];
  for (int i = 0; i < D / 2; ++i) out[threadIdx.x * (D / 2) + i] = rotary_partner<D>(sums, i);
}

template <int D>
void Attention::partner() {
  Group& group = checks_["rotary_partner"];
  std::vector<float> in(64 * D), out(64 * D);
  for (int i = 0; i < 64 * D; ++i) in[size_t(i)] = float(d_at(i / (D / 2), i % (D / 2)));
  run(group, take_partners<D>, 128, in.data(), out.data());
  for (int i = 0; i < 64 * D; ++i) {
    const int at = int(in[size_t(i)]), row = at / 256, column = at % 256;
    group.expect(int(out[size_t(i)]) == row * 256 + (column + D / 2) % D, "D %d row %d column %d",
                 D, row, column);
  }
}

}  // namespace

void check_attention(const Tables& tables, Checks& checks) {
  Attention attention(tables, checks);
  // Q K^T, and S and dP of the backward.
  attention.ss<64, 192, 128>("a_k_192x64", "b_k_128x64_n128");
  attention.ss<64, 128, 128>("a_k_128x64", "b_k_128x64_n128");
  attention.ss<72, 192, 128>("a_k_192x96_sw64", "b_k_128x96_n128_sw64");
  attention.ss<72, 128, 128>("a_k_128x96_sw64", "b_k_128x96_n128_sw64");
  attention.ss<80, 128, 160>("a_k_128x96_sw64", "b_k_160x96_n160_sw64");
  attention.ss<80, 128, 128>("a_k_128x96_sw64", "b_k_128x96_n128_sw64");
  attention.ss<80, 128, 96>("a_k_128x96_sw64", "b_k_96x96_n96_sw64");
  attention.ss<80, 128, 64, 128>("a_k_128x96_sw64", "b_k_128x96_n64_sw64");
  attention.ss<128, 128, 128>("a_k_128x128", "b_k_128x128_n128");
  attention.ss<128, 128, 64>("a_k_128x128", "b_k_64x128_n64");
  // P V, and the gradients.
  attention.rs<64, 128>("b_mn_64x128_n64");
  attention.rs<72, 128>("b_mn_96x128_n72_sw64");
  attention.rs<80, 160>("b_mn_96x160_n80_sw64");
  attention.rs<80, 128>("b_mn_96x128_n80_sw64");
  attention.rs<80, 96>("b_mn_96x96_n80_sw64");
  attention.rs<128, 128>("b_mn_128x128_n128");
  attention.rs<128, 64>("b_mn_128x64_n128");
  // dS K.
  for (int group = 0; group < kGroups; ++group) {
    attention.dq<64, 64>("a_mn_128x128", group, "b_mn_64x128_n64", 0);
    attention.dq<72, 72>("a_mn_128x128", group, "b_mn_96x128_n72_sw64", 0);
    attention.dq<80, 80>("a_mn_128x128", group, "b_mn_96x128_n80_sw64", 0);
    attention.dq<128, 64>("a_mn_64x128", 0, "b_mn_128x128_n64", group);
  }
  // The tiles that these read.
  attention.tile<64, 192>("a_k_192x64");
  attention.tile<64, 128>("b_k_128x64_n128", "b_mn_64x128_n64");
  attention.tile<72, 192>("a_k_192x96_sw64");
  attention.tile<72, 128>("b_k_128x96_n128_sw64", "b_mn_96x128_n72_sw64");
  attention.tile<80, 160>("b_k_160x96_n160_sw64", "b_mn_96x160_n80_sw64");
  attention.tile<80, 128>("b_k_128x96_n128_sw64", "b_mn_96x128_n80_sw64");
  attention.tile<80, 96>("b_k_96x96_n96_sw64", "b_mn_96x96_n80_sw64");
  attention.tile<128, 128>("b_k_128x128_n128", "b_mn_128x128_n128");
  attention.tile<128, 64>("b_k_64x128_n64", "b_mn_128x64_n128");
  attention.ds<128>("a_mn_128x128");
  attention.ds<64>("a_mn_64x128");
  attention.pack<64>();
  attention.pack<96>();
  attention.pack<128>();
  attention.pack<160>();
  attention.zero<64>();
  attention.partner<64>();
  attention.partner<72>();
  attention.partner<80>();
  attention.partner<128>();
}

}  // namespace hopper

// ldmatrix, mma.sync and wgmma. Fragment layouts are those of the PTX manual.
#include "test/twin/block.h"

namespace simt {
namespace {

inline float widen(uint16_t half, bool bf16) {
  if (bf16) return bit_copy<float>(uint32_t(half) << 16);
  __half_raw raw;
  raw.x = half;
  return __half2float(__half(raw));
}
inline uint16_t half_of(uint32_t reg, int i) { return uint16_t(reg >> (16 * i)); }

struct LdmatrixCall {
  uint32_t* regs;
  int count;
  bool transposed;
  uint16_t row[8];
};

struct MmaCall {
  float* d;
  const uint32_t *a, *b;
  bool bf16;
};

}  // namespace

// The row is read in the lane's own fiber, so that the sanitizers attribute the access to it.
void ldmatrix(uint32_t* regs, int count, bool transposed, uint32_t row_address, Where at) {
  Quiet quiet;
  LdmatrixCall call{regs, count, transposed, {}};
  if (current->lane < 8 * count) {
    if (row_address % 16) fail("ldmatrix: row address is not 16-byte aligned", at);
    shared_check(row_address, 16, "ldmatrix", at);
    watch::reads(shared_pointer(row_address), 16);
    memcpy(call.row, shared_pointer(row_address), 16);
  }
  collective(
      Op::ldmatrix, ~0u, &call,
      [](void** all, uint32_t) {
        const LdmatrixCall* lanes[32];
        for (int i = 0; i < 32; ++i) lanes[i] = static_cast<LdmatrixCall*>(all[i]);
        const bool flip = lanes[0]->transposed;
        for (int m = 0; m < lanes[0]->count; ++m)
          for (int t = 0; t < 32; ++t) {
            uint32_t packed = 0;
            for (int j = 0; j < 2; ++j) {
              const int row = t / 4, col = t % 4 * 2 + j;
              const uint16_t e = flip ? lanes[m * 8 + col]->row[row] : lanes[m * 8 + row]->row[col];
              packed |= uint32_t(e) << (16 * j);
            }
            lanes[t]->regs[m] = packed;
          }
      },
      at);
}

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, bool bf16, Where at) {
  Quiet quiet;
  MmaCall call{d, a, b, bf16};
  collective(
      Op::mma, ~0u, &call,
      [](void** all, uint32_t) {
        float A[16][16], B[16][8];
        for (int t = 0; t < 32; ++t) {
          const auto& c = *static_cast<MmaCall*>(all[t]);
          const int row = t / 4, k = t % 4 * 2;
          for (int r = 0; r < 4; ++r)
            for (int j = 0; j < 2; ++j)
              A[row + 8 * (r & 1)][k + j + 8 * (r >> 1)] = widen(half_of(c.a[r], j), c.bf16);
          for (int r = 0; r < 2; ++r)
            for (int j = 0; j < 2; ++j) B[k + j + 8 * r][row] = widen(half_of(c.b[r], j), c.bf16);
        }
        float D[16][8] = {};
        for (int m = 0; m < 16; ++m)
          for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 8; ++n) D[m][n] += A[m][k] * B[k][n];
        for (int t = 0; t < 32; ++t)
          for (int i = 0; i < 4; ++i)
            static_cast<MmaCall*>(all[t])->d[i] += D[t / 4 + 8 * (i >> 1)][t % 4 * 2 + (i & 1)];
      },
      at);
}

// ---- wgmma ----
// Each warp computes its own 16 rows when it reaches the instruction, without waiting for the other
// three: less synchronised than the hardware, so a missing barrier shows.
namespace {

struct Operand {
  uint32_t start, leading, stride;
  Swizzle swizzle;
  bool mn_major;

  Operand(uint64_t desc, bool mn)
      : start(uint32_t(desc & 0x3FFF) << 4),
        leading(uint32_t(desc >> 16 & 0x3FFF) << 4),
        stride(uint32_t(desc >> 32 & 0x3FFF) << 4),
        swizzle(Swizzle(desc >> 62)),
        mn_major(mn) {}

  // Elements across one row of the swizzle.
  uint32_t span() const {
    static const uint32_t spans[] = {8, 64, 32, 16};
    return spans[size_t(swizzle)];
  }

  // Address of the 16 bytes that begin at element (mn, k): eight along k, or along mn if mn_major.
  uint32_t chunk(int mn_index, int k_index) const {
    const uint32_t span = this->span(), mn = uint32_t(mn_index), k = uint32_t(k_index);
    uint32_t address = start;
    if (!mn_major && swizzle == Swizzle::none)
      address += mn / 8 * stride + mn % 8 * 16 + k / 8 * leading;
    else if (!mn_major)
      address += mn / 8 * stride + mn % 8 * (span * 2) + k * 2;
    else if (swizzle == Swizzle::none)
      address += mn / 8 * stride + k / 8 * leading + k % 8 * 16;
    else
      address += mn / span * leading + k / 8 * stride + k % 8 * (span * 2) + mn % span * 2;
    return swizzled(address, swizzle);
  }

  // f(mn, k, address) for every 16-byte chunk of `rows` rows from `first`, 16 deep.
  template <class F>
  void each_chunk(int first, int rows, F f) const {
    if (!mn_major) {
      for (int r = 0; r < rows; ++r)
        for (int k = 0; k < 16; k += 8) f(first + r, k, chunk(first + r, k));
    } else {
      for (int k = 0; k < 16; ++k)
        for (int r = 0; r < rows; r += 8) f(first + r, k, chunk(first + r, k));
    }
  }

  // With a base offset of 0, as matrix_desc makes it, a swizzle's pattern of 8 rows has to begin at
  // a multiple of its size. A K-major operand may begin within the first of these rows.
  void check_pattern(uint64_t desc, int rows, Where at) const {
    constexpr uint64_t fields = 0xC00E3FFF3FFF3FFFull;
    if (desc & ~fields) fail("wgmma: reserved bits of a descriptor are set", at);
    if (desc >> 49 & 7)
      fail("wgmma: a descriptor has a base offset, which the twin does not model", at);
    if (swizzle == Swizzle::none) return;
    const uint32_t row = span() * 2, pattern = 8 * row;
    if (start % pattern >= (mn_major ? 1 : row))
      fail("wgmma: an operand at " + std::to_string(start) + " begins within a pattern of " +
               std::to_string(pattern) + " bytes",
           at);
    if (stride % pattern || (mn_major && rows > int(span()) && leading % pattern))
      fail("wgmma: strides of " + std::to_string(stride) + " and " + std::to_string(leading) +
               " bytes are no whole patterns of " + std::to_string(pattern),
           at);
  }

  void check(int first, int rows, Where at) const {
    each_chunk(first, rows, [&](int, int, uint32_t address) {
      shared_check(address, 16, "wgmma", at);
      async_reads(address, 16, "wgmma", at);
    });
  }

  // out[mn - first][k]
  void load(int first, int rows, bool bf16, float* out) const {
    each_chunk(first, rows, [&](int mn, int k, uint32_t address) {
      uint16_t e[8];
      watch::reads(shared_pointer(address), 16);
      memcpy(e, shared_pointer(address), 16);
      for (int i = 0; i < 8; ++i) {
        const int row = mn - first + (mn_major ? i : 0), col = k + (mn_major ? 0 : i);
        out[row * 16 + col] = widen(e[i], bf16);
      }
    });
  }
};

constexpr uint32_t busy = 0xFFFFFFFFu;  // NaN: what an accumulator in flight holds

bool untouched(const Registers& r) {
  for (int lane = 0; lane < 32; ++lane)
    if (memcmp(r.lane[lane], &r.expected[r.index(lane, 0)], size_t(r.words) * 4) != 0) return false;
  return true;
}

void remember(Registers& r) {
  for (int lane = 0; lane < 32; ++lane)
    memcpy(&r.expected[r.index(lane, 0)], r.lane[lane], size_t(r.words) * 4);
}

// Finds the record of these arrays and applies the rule of wgmma.fence: registers that the threads
// have written need a fence between that and the wgmma.
Registers& use_registers(Warp& w, uint32_t* const* lanes, int words, const char* what, Where at) {
  for (auto& known : w.registers) {
    Registers& r = *known;
    if (r.words != words || memcmp(r.lane, lanes, sizeof(r.lane)) != 0) continue;
    if (!untouched(r)) {
      if (r.in_flight)
        fail(std::string("wgmma: ") + what + " registers were written while a wgmma uses them", at);
      if (r.fence_epoch == w.fence_epoch)
        fail(std::string("wgmma: ") + what + " registers were written since the last wgmma.fence",
             at);
    }
    r.fence_epoch = w.fence_epoch;
    return r;
  }
  if (!w.fenced)
    fail(std::string("wgmma: no wgmma.fence before the first use of these ") + what + " registers",
         at);
  // The memory of arrays whose scope has ended may be reused for arrays of another size.
  for (auto& known : w.registers)
    if (!known->in_flight && known->lane[0] == lanes[0]) {
      std::swap(known, w.registers.back());
      w.registers.pop_back();
      break;
    }
  w.registers.push_back(std::make_unique<Registers>());
  Registers& r = *w.registers.back();
  std::copy(lanes, lanes + 32, r.lane);
  r.words = words;
  r.expected.resize(size_t(words) * 32);
  r.fence_epoch = w.fence_epoch;
  return r;
}

void multiply(Warp& w, PendingWgmma& p) {
  const Wgmma& op = p.op;
  float A[16 * 16];
  if (p.a) {
    if (!untouched(*p.a))
      fail("wgmma: A registers were written before the wgmma that reads them was waited for", p.at);
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 16; ++k) {
        const int lane = row % 8 * 4 + k % 8 / 2, reg = row / 8 + 2 * (k / 8);
        A[row * 16 + k] = widen(half_of(p.a->expected[p.a->index(lane, reg)], k & 1), op.bf16);
      }
  } else {
    Operand(op.a_desc, op.a_mn_major).load(w.id % 4 * 16, 16, op.bf16, A);
  }
  std::vector<float> B(size_t(op.n) * 16);
  Operand(op.b_desc, op.b_mn_major).load(0, op.n, op.bf16, B.data());
  const int words = op.n / 2;
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < words; ++i) {
      const int row = lane / 4 + 8 * (i / 2 % 2), col = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += A[row * 16 + k] * B[size_t(col) * 16 + size_t(k)];
      float& d = p.d->value[p.d->index(lane, i)];
      d = op.accumulate ? d + sum : sum;
    }
}

void publish(Registers& d) {
  for (int lane = 0; lane < 32; ++lane)
    memcpy(d.lane[lane], &d.value[d.index(lane, 0)], size_t(d.words) * 4);
  remember(d);
}

void run_group(Warp& w, WgmmaGroup& group) {
  watch::As tensor_core(w.async_identity);
  for (PendingWgmma& p : group.ops) {
    if (p.done) continue;
    p.done = true;
    multiply(w, p);
  }
  watch::release(group.finished.get());
}

void run_everything_issued(Warp& w) {
  for (WgmmaGroup& g : w.wgmma_groups) run_group(w, g);
  run_group(w, w.wgmma_open);
  for (auto& r : w.registers)
    if (r->in_flight && !r->value.empty()) publish(*r);
}

struct WgmmaCall {
  float* d;
  const uint32_t* a;
  const Wgmma* op;
  Where at;
};

void mix(uint64_t& hash, uint64_t value) { hash = (hash ^ value) * 0x100000001B3ull; }

void issue(void** all, uint32_t) {
  const auto& first = *static_cast<WgmmaCall*>(all[0]);
  const Wgmma& op = *first.op;
  Warp& w = *current->warp;
  uint32_t *d_lanes[32], *a_lanes[32];
  for (int i = 0; i < 32; ++i) {
    const auto& c = *static_cast<WgmmaCall*>(all[i]);
    if (c.op->a_desc != op.a_desc || c.op->b_desc != op.b_desc || c.op->n != op.n ||
        c.op->accumulate != op.accumulate)
      fail("wgmma: lanes of one warp give different operands", c.at);
    d_lanes[i] = reinterpret_cast<uint32_t*>(c.d);
    a_lanes[i] = const_cast<uint32_t*>(c.a);
  }
  if (block->opt.on_wgmma) block->opt.on_wgmma(op, first.a != nullptr, w.id);
  mix(w.wgmma_history, op.b_desc);
  mix(w.wgmma_history, op.a_desc);
  mix(w.wgmma_history, uint64_t(op.n) * 8 + op.a_mn_major * 4 + op.b_mn_major * 2 + op.accumulate);

  Registers& d = use_registers(w, d_lanes, op.n / 2, "accumulator", first.at);
  Registers* a = nullptr;
  if (first.a) {
    a = &use_registers(w, a_lanes, 4, "A", first.at);
    remember(*a);
    ++a->in_flight;
  } else {
    const Operand in_memory(op.a_desc, op.a_mn_major);
    in_memory.check_pattern(op.a_desc, 64, first.at);
    in_memory.check(w.id % 4 * 16, 16, first.at);
  }
  const Operand b(op.b_desc, op.b_mn_major);
  b.check_pattern(op.b_desc, op.n, first.at);
  b.check(0, op.n, first.at);
  if (d.in_flight++ == 0) {
    d.value.resize(d.expected.size());
    for (int lane = 0; lane < 32; ++lane)
      memcpy(&d.value[d.index(lane, 0)], d.lane[lane], size_t(d.words) * 4);
    if (block->opt.poison)
      for (int lane = 0; lane < 32; ++lane) std::fill(d.lane[lane], d.lane[lane] + d.words, busy);
    remember(d);
  }
  w.wgmma_open.ops.push_back({op, &d, a, first.at});
  if (block->at_once()) run_everything_issued(w);
}

void retire(void** all, uint32_t) {
  const int groups_left = *static_cast<int*>(all[0]);
  Warp& w = *current->warp;
  w.fenced = false;
  while (int(w.wgmma_groups.size()) > groups_left) {
    WgmmaGroup group = std::move(w.wgmma_groups.front());
    w.wgmma_groups.pop_front();
    run_group(w, group);
    {
      watch::As retired(w.retired_identity);
      watch::acquire(group.finished.get());
      watch::release(&w.async_done);
    }
    for (PendingWgmma& p : group.ops) {
      if (p.a) {
        if (!untouched(*p.a))
          fail("wgmma: A registers were written before the wgmma that reads them was waited for",
               p.at);
        --p.a->in_flight;
      }
      if (--p.d->in_flight) continue;
      if (!untouched(*p.d))
        fail("wgmma: accumulator registers were written before the wgmma was waited for", p.at);
      publish(*p.d);
    }
  }
}

}  // namespace

void wgmma(float* d, const uint32_t* a_regs, const Wgmma& op, Where at) {
  Quiet quiet;
  if (op.n < 8 || op.n > 256 || op.n % 8) fail("wgmma: N is not a multiple of 8 up to 256", at);
  WgmmaCall call{d, a_regs, &op, at};
  collective(Op::wgmma, ~0u, &call, issue, at);
}

void wgmma_fence(Where at) {
  Quiet quiet;
  collective(
      Op::wgmma_fence, ~0u, nullptr,
      [](void**, uint32_t) {
        current->warp->fenced = true;
        ++current->warp->fence_epoch;
      },
      at);
}

void wgmma_commit(Where at) {
  Quiet quiet;
  collective(
      Op::wgmma_commit, ~0u, nullptr,
      [](void**, uint32_t) {
        Warp& w = *current->warp;
        w.wgmma_groups.push_back(std::move(w.wgmma_open));
        w.wgmma_open = WgmmaGroup{};
      },
      at);
}

void wgmma_wait(int groups_left, Where at) {
  Quiet quiet;
  collective(Op::wgmma_wait, ~0u, &groups_left, retire, at);
  watch::acquire(&current->warp->async_done);
}

}  // namespace simt

// Synchronisation between threads: block barriers, warp collectives, mbarriers.
#include "test/twin/block.h"

namespace simt {
namespace {

// Releases what the warp's async proxy has observed along with what the lane has, so that a proxy
// fence before a barrier covers the thread that issues after it.
void release_async(Warp& w, const Tag* tag) {
#if SIMT_TSAN
  watch::As async(w.async_identity);
  watch::release(tag);
#else
  (void)w, (void)tag;
#endif
}
void acquire_async(Warp& w, const Tag* tag) {
#if SIMT_TSAN
  watch::As async(w.async_identity);
  watch::acquire(tag);
#else
  (void)w, (void)tag;
#endif
}

void open_barrier(Barrier& b) {
  b.result_count = b.count;
  b.result_voters = b.voters;
  b.count = b.voters = b.arrived = b.expected = 0;
  ++b.generation;
  wake(b.waiting);
}

void meet_at_barrier(int id, int threads, bool whole_block, bool wait, Where at) {
  if (leaving()) return;
  Block& b = *block;
  if (id < 0 || id > 15) fail("barrier id " + std::to_string(id) + " is not in 0..15", at);
  if (threads % 32 || threads > (b.threads + 31) / 32 * 32)
    fail("barrier count " + std::to_string(threads) + " is not a multiple of 32 within the block",
         at);
  Barrier& barrier = b.barriers[id];
  if (barrier.arrived == 0) {
    barrier.expected = threads;
    barrier.first = at;
    barrier.whole_block = whole_block;
  }
  if (barrier.expected != threads)
    fail("barrier " + std::to_string(id) + ": threads give different counts (" +
             std::to_string(barrier.expected) + " at " + text(barrier.first) + ", " +
             std::to_string(threads) + " here)",
         at);
  if (whole_block && (barrier.first.line != at.line || strcmp(barrier.first.file, at.file)))
    fail("divergent __syncthreads: others wait at " + text(barrier.first), at);
  const unsigned parity = barrier.generation & 1;
  Warp& w = *current->warp;
  watch::release(&barrier.tag[parity]);
  release_async(w, &barrier.async_tag[parity]);
  const int needed = threads ? threads : b.live;
  if (++barrier.arrived == needed) {
    open_barrier(barrier);
  } else if (wait) {
    barrier.waiting.push_back(&self());
    wait_for(whole_block ? "__syncthreads" : "bar.sync", id, at);
  }
  if (wait) {
    watch::acquire(&barrier.tag[parity]);
    acquire_async(w, &barrier.async_tag[parity]);
  }
}

}  // namespace

void sync_threads(Where at) {
  Quiet quiet;
  meet_at_barrier(0, 0, true, true, at);
}
void bar_sync(int id, int threads, Where at) {
  Quiet quiet;
  if (threads < 32) fail("barrier count " + std::to_string(threads) + " is below one warp", at);
  meet_at_barrier(id, threads, false, true, at);
}
void bar_arrive(int id, int threads, Where at) {
  Quiet quiet;
  if (threads < 32) fail("barrier count " + std::to_string(threads) + " is below one warp", at);
  meet_at_barrier(id, threads, false, false, at);
}

int sync_threads_reduce(int predicate, Reduce how, Where at) {
  Quiet quiet;
  Barrier& barrier = block->barriers[0];
  barrier.count += predicate != 0;
  ++barrier.voters;
  meet_at_barrier(0, 0, true, true, at);
  switch (how) {
    case Reduce::count:
      return barrier.result_count;
    case Reduce::all:
      return barrier.result_count == barrier.result_voters;
    case Reduce::any:
      break;
  }
  return barrier.result_count > 0;
}

// An exited thread no longer counts for __syncthreads, and cannot take part in a warp collective.
void thread_exits(Fiber& f) {
  Block& b = *block;
  if (!f.copies_open.empty() || !f.copy_groups.empty())
    b.error = "simt: thread " + std::to_string(f.linear) + " exits with cp.async not waited for";
  for (int i = 0; i < f.warp->meetings; ++i) {
    const Rendezvous& r = f.warp->meeting[i];
    if (r.mask >> f.lane & 1)
      b.error = "simt: lane " + std::to_string(f.lane) + " of warp " + std::to_string(f.warp->id) +
                " exited but is named in the mask of a waiting " + name_of(r.op) + " [" +
                text(r.at) + "]";
  }
  Barrier& barrier = b.barriers[0];
  if (barrier.whole_block && barrier.arrived && barrier.arrived == b.live) open_barrier(barrier);
}

// ---- warp collectives ----
const char* name_of(Op op) {
  switch (op) {
    case Op::syncwarp:
      return "__syncwarp";
    case Op::shfl:
      return "__shfl_sync";
    case Op::vote:
      return "vote";
    case Op::match:
      return "__match_sync";
    case Op::reduce:
      return "__reduce_sync";
    case Op::ldmatrix:
      return "ldmatrix";
    case Op::mma:
      return "mma";
    case Op::wgmma:
      return "wgmma";
    case Op::wgmma_fence:
      return "wgmma.fence";
    case Op::wgmma_commit:
      return "wgmma.commit_group";
    case Op::wgmma_wait:
      return "wgmma.wait_group";
    case Op::setmaxnreg:
      return "setmaxnreg";
  }
  return "";
}

void collective(Op op, uint32_t mask, void* argument, Exchange exchange, Where at) {
  if (leaving()) return;
  Fiber& f = self();
  Warp& w = *f.warp;
  ++block->collectives;
  if (!(mask >> f.lane & 1))
    fail(std::string(name_of(op)) + ": lane " + std::to_string(f.lane) + " is not in its own mask",
         at);
  if (mask & ~w.live)
    fail(std::string(name_of(op)) + ": the mask names lanes that have exited or never were", at);
  Rendezvous* r = nullptr;
  for (int i = 0; i < w.meetings && !r; ++i)
    if (w.meeting[i].mask == mask) r = &w.meeting[i];
  if (!r) {
    r = &w.meeting[w.meetings++];
    r->mask = mask;
    r->arrived = 0;
    r->op = op;
    r->at = at;
  }
  if (r->op != op)
    fail("lanes of one mask are at different collectives: " + std::string(name_of(r->op)) + " at " +
             text(r->at) + ", " + name_of(op) + " here",
         at);
  r->arrived |= 1u << f.lane;
  r->argument[f.lane] = argument;
  r->fiber[f.lane] = &f;
  if (r->arrived != mask) {
    wait_for(name_of(op), -1, at);
    return;
  }
  if (exchange) exchange(r->argument, mask);
  std::vector<Fiber*> others;
  others.reserve(32);
  for (int i = 0; i < 32; ++i)
    if ((mask >> i & 1) && i != f.lane) others.push_back(r->fiber[i]);
  *r = w.meeting[--w.meetings];
  wake(others);
}

void warp_sync(uint32_t mask, Where at) {
  Quiet quiet;
  Warp& w = *current->warp;
  const unsigned parity = w.sync_generation & 1;
  watch::release(&w.sync_tag[parity]);
  collective(
      Op::syncwarp, mask, nullptr, [](void**, uint32_t) { ++current->warp->sync_generation; }, at);
  watch::acquire(&w.sync_tag[parity]);
}

// The device returns whichever lanes happen to be converged. This returns the lanes that wait at
// the same line once no other thread of the block can run: a legal result, and the smallest.
uint32_t active_mask(Where at) {
  Quiet quiet;
  Fiber& f = self();
  f.warp->asking_active.push_back(&f);
  wait_for("__activemask", -1, at);
  return f.active;
}

bool release_active_askers() {
  for (Warp& w : block->warps) {
    if (w.asking_active.empty()) continue;
    const Where site = w.asking_active[0]->at;
    std::vector<Fiber*> together, rest;
    uint32_t mask = 0;
    for (Fiber* f : w.asking_active) {
      const bool here = f->at.line == site.line && !strcmp(f->at.file, site.file);
      (here ? together : rest).push_back(f);
      if (here) mask |= 1u << f->lane;
    }
    for (Fiber* f : together) f->active = mask;
    w.asking_active = rest;
    wake(together);
    return true;
  }
  return false;
}

namespace {
template <class F>
void each_lane(uint32_t mask, F f) {
  for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
}

struct ShuffleCall {
  uint64_t value, result;
  Shuffle kind;
  int operand, width;
};
struct VoteCall {
  uint64_t value;
  uint32_t result;
};
}  // namespace

uint64_t shuffle_bits(Shuffle kind, uint32_t mask, uint64_t bits, int operand, int width,
                      Where at) {
  Quiet quiet;
  if (width < 1 || width > 32 || (width & (width - 1)))
    fail("shuffle width " + std::to_string(width) + " is not a power of two up to 32", at);
  ShuffleCall call{bits, 0, kind, operand, width};
  collective(
      Op::shfl, mask, &call,
      [](void** all, uint32_t m) {
        each_lane(m, [&](int lane) {
          auto& c = *static_cast<ShuffleCall*>(all[lane]);
          const int base = lane & ~(c.width - 1);
          int source = lane;
          switch (c.kind) {
            case Shuffle::index:
              source = base + (c.operand & (c.width - 1));
              break;
            case Shuffle::up:
              if (lane - c.operand >= base) source = lane - c.operand;
              break;
            case Shuffle::down:
              if (lane + c.operand < base + c.width) source = lane + c.operand;
              break;
            case Shuffle::bfly:
              if ((lane ^ c.operand) < base + c.width) source = lane ^ c.operand;
              break;
          }
          // Undefined on the device when the source lane is not there: poison.
          c.result = m >> source & 1 ? static_cast<ShuffleCall*>(all[source])->value : ~0ull;
        });
      },
      at);
  return call.result;
}

uint32_t ballot(uint32_t mask, int predicate, Where at) {
  Quiet quiet;
  VoteCall call{uint64_t(predicate != 0), 0};
  collective(
      Op::vote, mask, &call,
      [](void** all, uint32_t m) {
        uint32_t yes = 0;
        each_lane(m, [&](int i) { yes |= uint32_t(static_cast<VoteCall*>(all[i])->value) << i; });
        each_lane(m, [&](int i) { static_cast<VoteCall*>(all[i])->result = yes; });
      },
      at);
  return call.result;
}

uint32_t reduce_add(uint32_t mask, uint32_t value, Where at) {
  Quiet quiet;
  VoteCall call{value, 0};
  collective(
      Op::reduce, mask, &call,
      [](void** all, uint32_t m) {
        uint32_t sum = 0;
        each_lane(m, [&](int i) { sum += uint32_t(static_cast<VoteCall*>(all[i])->value); });
        each_lane(m, [&](int i) { static_cast<VoteCall*>(all[i])->result = sum; });
      },
      at);
  return call.result;
}

uint32_t match_any(uint32_t mask, uint64_t value, Where at) {
  Quiet quiet;
  VoteCall call{value, 0};
  collective(
      Op::match, mask, &call,
      [](void** all, uint32_t m) {
        each_lane(m, [&](int i) {
          auto& mine = *static_cast<VoteCall*>(all[i]);
          each_lane(m, [&](int j) {
            if (static_cast<VoteCall*>(all[j])->value == mine.value) mine.result |= 1u << j;
          });
        });
      },
      at);
  return call.result;
}

uint32_t match_all(uint32_t mask, uint64_t value, int* all_equal, Where at) {
  const uint32_t same = match_any(mask, value, at);
  *all_equal = same == mask;
  return same == mask ? mask : 0;
}

// ---- setmaxnreg ----
// The registers that a block was launched with are one pool: what a warp gives up, another takes,
// or waits for.
void set_max_registers(int count, bool increase, Where at) {
  Quiet quiet;
  if (leaving()) return;
  Block& b = *block;
  Warp& w = *current->warp;
  if (increase ? count < w.registers_held : count > w.registers_held)
    fail("setmaxnreg." + std::string(increase ? "inc" : "dec") + " to " + std::to_string(count) +
             " of a warp that has " + std::to_string(w.registers_held),
         at);
  collective(Op::setmaxnreg, ~0u, nullptr, nullptr, at);
  // The first lane to go on does it for the warp.
  while (w.registers_held != count) {
    const int wanted = count - w.registers_held;
    if (wanted <= b.free_registers) {
      b.free_registers -= wanted;
      w.registers_held = count;
      wake(b.wants_registers);
    } else {
      b.wants_registers.push_back(&self());
      wait_for("setmaxnreg", count, at);
    }
  }
}

// ---- mbarriers ----
namespace {

// Written to a barrier's own eight bytes, to detect that they are overwritten.
uint64_t cookie(uint32_t bar) { return 0x6D62617272696572ull ^ (uint64_t(bar) << 40); }

MBarrier& find_mbarrier(uint32_t bar, Where at) {
  auto it = block->mbarriers.find(bar);
  if (it == block->mbarriers.end())
    fail("mbarrier at " + std::to_string(bar) + " was never initialised", at);
  const uint64_t mark = cookie(bar);
  if (memcmp(shared_pointer(bar), &mark, 8) != 0)
    fail("mbarrier at " + std::to_string(bar) + " was overwritten", at);
  return it->second;
}

// What an mbarrier can count, of arrivals and of bytes in either direction.
constexpr int most_counted = (1 << 20) - 1;

void add_bytes(uint32_t bar, MBarrier& m, long bytes, Where at) {
  m.bytes_due += bytes;
  if (m.bytes_due < -most_counted || m.bytes_due > most_counted)
    fail("mbarrier at " + std::to_string(bar) + ": " + std::to_string(m.bytes_due) +
             " bytes are more than it can count",
         at);
}

void maybe_complete_phase(MBarrier& m) {
  if (m.pending != 0 || m.bytes_due != 0) return;
  m.phase ^= 1;
  m.seen = false;
  m.pending = m.count;
  wake(m.waiting);
}

}  // namespace

void check_mbarrier(uint32_t bar, Where at) { find_mbarrier(bar, at); }

void mbar_init(uint32_t bar, int count, Where at) {
  Quiet quiet;
  if (bar % 8) fail("mbarrier at " + std::to_string(bar) + " is not 8-byte aligned", at);
  if (count < 1 || count > most_counted)
    fail("mbarrier with a count of " + std::to_string(count), at);
  shared_check(bar, 8, "mbarrier.init", at);
  MBarrier m;
  m.count = m.pending = count;
  block->mbarriers[bar] = std::move(m);
  const uint64_t mark = cookie(bar);
  memcpy(shared_pointer(bar), &mark, 8);
  watch::writes(shared_pointer(bar), 8);
}

void mbar_expect(uint32_t bar, int bytes, Where at) {
  Quiet quiet;
  if (leaving()) return;
  add_bytes(bar, find_mbarrier(bar, at), bytes, at);
}

void mbar_arrive(uint32_t bar, int expect_bytes, Where at) {
  Quiet quiet;
  if (leaving()) return;
  MBarrier& m = find_mbarrier(bar, at);
  watch::reads(shared_pointer(bar), 8);
  watch::release(m.threads(m.phase));
  release_async(*current->warp, m.async(m.phase));
  if (m.pending <= 0)
    fail("mbarrier at " + std::to_string(bar) + ": more arrivals than its count in one phase", at);
  if (!m.seen)
    fail("mbarrier at " + std::to_string(bar) +
             ": an arrival before any wait has seen the phase before complete",
         at);
  add_bytes(bar, m, expect_bytes, at);
  --m.pending;
  maybe_complete_phase(m);
}

void mbar_wait(uint32_t bar, int parity, Where at) {
  Quiet quiet;
  if (leaving()) return;
  if (parity != 0 && parity != 1) fail("mbarrier parity is neither 0 nor 1", at);
  MBarrier& m = find_mbarrier(bar, at);
  watch::reads(shared_pointer(bar), 8);
  while (int(m.phase) == parity) {
    m.waiting.push_back(&self());
    wait_for("mbarrier wait", int(bar), at);
  }
  m.seen = true;
  watch::acquire(m.threads(unsigned(parity)));
  acquire_async(*current->warp, m.async(unsigned(parity)));
}

// Called under the TMA's identity.
void complete_bytes(uint32_t bar, size_t bytes) {
  const Where tma{"TMA", 0};
  MBarrier& m = find_mbarrier(bar, tma);
  watch::release(m.threads(m.phase));
  watch::release(m.async(m.phase));
  add_bytes(bar, m, -long(bytes), tma);
  maybe_complete_phase(m);
}

}  // namespace simt

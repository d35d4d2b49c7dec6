// A block's shared memory: one arena, poisoned, with red zones between arrays; and which bytes are
// visible to the async proxy (TMA stores, wgmma operands).
#include "test/twin/block.h"

namespace simt {

void reset_shared(size_t dynamic_bytes) {
  Block& b = *block;
  if (!b.arena) {
    b.arena = static_cast<unsigned char*>(aligned_alloc(4096, arena_bytes));
    b.seen = static_cast<unsigned char*>(aligned_alloc(4096, arena_bytes));
  }
  watch::allow(b.arena, arena_bytes);
  // Only what an earlier block can have written is poisoned again.
  const size_t used = b.top ? std::min(arena_bytes, b.top + red_zone) : arena_bytes;
  if (b.opt.poison) memset(b.arena, 0xFF, used);
  memcpy(b.seen, b.arena, used);
  b.seen_at.assign(arena_bytes / granule, 0);
  b.proxy_fences = 0;
  watch::writes(b.arena, used);
  watch::forbid(b.arena, arena_bytes);
  watch::allow(b.arena + dynamic_base, dynamic_bytes);
  b.top = dynamic_base + dynamic_bytes;
  b.dynamic_bytes = dynamic_bytes;
  b.static_bytes = 0;
  b.high = std::max(b.high, dynamic_bytes);
  b.arrays.clear();
}

namespace {

// The dynamic memory of a block begins behind its static arrays, at a multiple of 1024.
void check_shared_size(Where at) {
  const Block& b = *block;
  constexpr size_t without_opt_in = 48 * 1024;
  const size_t padded = b.dynamic_bytes ? round_up(b.static_bytes, 1024) : b.static_bytes;
  const size_t most = b.shared_opt_in ? b.opt.shared_limit : without_opt_in;
  if (padded + b.dynamic_bytes > most || b.static_bytes > without_opt_in)
    fail(std::to_string(padded) + " bytes of static and " + std::to_string(b.dynamic_bytes) +
             " of dynamic shared memory, at most " + std::to_string(most) +
             (b.shared_opt_in ? "" : " without the opt-in"),
         at);
}

}  // namespace

void* shared_dynamic() { return block->arena + dynamic_base; }

void* shared_array(const void* site, size_t bytes, size_t align, Where at) {
  Quiet quiet;
  Block& b = *block;
  void*& p = b.arrays[site];
  if (p) return p;
  b.static_bytes = round_up(b.static_bytes, align) + bytes;
  check_shared_size(at);
  const size_t start = round_up(b.top + red_zone, align);
  if (start + bytes + red_zone > arena_bytes) fail("shared memory is full", at);
  p = b.arena + start;
  b.top = start + bytes;
  b.high = std::max(b.high, b.top - dynamic_base);
  watch::allow(p, bytes);
  return p;
}

uint32_t shared_address(const void* pointer, Where at) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(pointer) - block->arena;
  if (offset < ptrdiff_t(dynamic_base) || offset > ptrdiff_t(block->top))
    fail("smem_u32: not a pointer into shared memory", at);
  return uint32_t(offset);
}

void* shared_pointer(uint32_t address) { return block->arena + address; }

void shared_check(uint32_t address, size_t bytes, const char* what, Where at) {
  if (address < dynamic_base || address + bytes > block->top)
    fail(std::string(what) + ": shared address " + std::to_string(address) + " + " +
             std::to_string(bytes) + " is out of bounds (" + std::to_string(dynamic_base) + " to " +
             std::to_string(block->top) + ")",
         at);
  if (watch::forbidden(block->arena + address, bytes))
    fail(std::string(what) + ": out of bounds of its shared array", at);
}

void async_wrote(uint32_t address, size_t bytes) {
  Block& b = *block;
  memcpy(b.seen + address, b.arena + address, bytes);
  for (uint32_t g = address / granule; g <= (address + bytes - 1) / granule; ++g)
    b.seen_at[g] = b.proxy_fences;
}

// The plain build's part of the proxy check: bytes that changed since they were last visible to the
// async proxy, with no fence.proxy.async by any thread in between, are not visible to it. (In the
// TSan build the fence has to be the writer's own, or to follow a synchronisation with the writer.)
void async_reads(uint32_t address, size_t bytes, const char* by, Where at) {
  Block& b = *block;
  for (uint32_t g = address / granule; g <= (address + bytes - 1) / granule; ++g) {
    const uint32_t start = g * granule;
    if (memcmp(b.arena + start, b.seen + start, granule) != 0) {
      if (b.seen_at[g] == b.proxy_fences)
        fail(std::string(by) + " reads shared memory that was written by ordinary stores with no " +
                 "fence_proxy_async in between",
             at);
      memcpy(b.seen + start, b.arena + start, granule);
    }
    b.seen_at[g] = b.proxy_fences;
  }
}

void fence_proxy_async() {
  Quiet quiet;
  if (leaving()) return;
  ++block->proxy_fences;
  Warp& w = *current->warp;
  watch::release(&w.to_async);
  watch::As async(w.async_identity);
  watch::acquire(&w.to_async);
}

}  // namespace simt

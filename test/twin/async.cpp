// Asynchronous copies: cp.async, TMA loads and stores of tiles, bulk reduction. Each takes effect
// as early or as late as the schedule says; until then its target holds poison.
#include "test/twin/block.h"

namespace simt {

// ---- cp.async: queued by the thread that issued it ----
namespace {
void land(CpAsync& c) {
  if (c.landed) return;
  c.landed = true;
  if (c.valid) watch::reads(c.src, size_t(c.valid));
  for (int i = 0; i < c.bytes; ++i) c.dst[i] = i < c.valid ? c.src[i] : 0;
  watch::writes(c.dst, size_t(c.bytes));
}
}  // namespace

void cp_async(uint32_t dst, const void* src, int bytes, int valid_bytes, Where at) {
  Quiet quiet;
  if (dst % unsigned(bytes) || reinterpret_cast<uintptr_t>(src) % unsigned(bytes))
    fail("cp.async: misaligned address", at);
  shared_check(dst, size_t(bytes), "cp.async", at);
  if (watch::forbidden(src, size_t(valid_bytes)))
    fail("cp.async: global source is out of bounds", at);
  Block& b = *block;
  CpAsync c{static_cast<unsigned char*>(shared_pointer(dst)),
            static_cast<const unsigned char*>(src), bytes, valid_bytes, false};
  if (b.at_once()) {
    land(c);
  } else if (b.opt.poison) {
    memset(c.dst, 0xFF, size_t(bytes));
    watch::writes(c.dst, size_t(bytes));
  }
  self().copies_open.push_back(c);
}

void cp_async_commit() {
  Quiet quiet;
  Fiber& f = self();
  f.copy_groups.push_back(std::move(f.copies_open));
  f.copies_open.clear();
}

void cp_async_wait(int groups_left) {
  Quiet quiet;
  auto& groups = self().copy_groups;
  while (int(groups.size()) > groups_left) {
    for (CpAsync& c : groups.front()) land(c);
    groups.pop_front();
  }
}

// ---- TMA ----
size_t element_bytes(Element e) {
  switch (e) {
    case Element::u8:
      return 1;
    case Element::f16:
    case Element::bf16:
      return 2;
    case Element::i32:
    case Element::f32:
      break;
  }
  return 4;
}

// 16-byte chunks are permuted within 128, 64 or 32 bytes by higher bits of the shared address.
uint32_t swizzled(uint32_t address, Swizzle mode) {
  switch (mode) {
    case Swizzle::none:
      return address;
    case Swizzle::b128:
      return address ^ (address >> 3 & 0x70);
    case Swizzle::b64:
      return address ^ (address >> 3 & 0x30);
    case Swizzle::b32:
      break;
  }
  return address ^ (address >> 3 & 0x10);
}

namespace {

size_t tile_bytes(const TensorMap& m) {
  size_t bytes = element_bytes(m.element);
  for (int i = 0; i < m.rank; ++i) bytes *= m.box[i];
  return bytes;
}

void check_tile(const TensorMap& m, uint32_t shared, int rank, const char* what, Where at) {
  if (m.rank != rank)
    fail(std::string(what) + ": the tensor map has rank " + std::to_string(m.rank) + ", not " +
             std::to_string(rank),
         at);
  static const uint32_t alignment[] = {128, 1024, 512, 256};
  const uint32_t need = alignment[size_t(m.swizzle)];
  if (shared % need)
    fail(std::string(what) + ": shared address " + std::to_string(shared) + " is not " +
             std::to_string(need) + "-byte aligned",
         at);
  shared_check(shared, tile_bytes(m), what, at);
}

// Visits the rows of a tile: f(offset in the tile, bytes inside, address inside, bytes before).
// A row is clipped to the tensor; a row outside it has no bytes inside.
template <class F>
void each_row(const TensorMap& m, const int* coord, F f) {
  const size_t element = element_bytes(m.element), row_bytes = m.box[0] * element;
  uint32_t at[5] = {0, 0, 0, 0, 0};
  for (uint32_t offset = 0;; offset += uint32_t(row_bytes)) {
    bool inside = true;
    auto* address = static_cast<unsigned char*>(m.base);
    for (int i = 1; i < m.rank; ++i) {
      const long c = coord[i] + long(at[i]);
      inside = inside && c >= 0 && c < long(m.dim[i]);
      address += c * long(m.stride[i]);
    }
    const long first = std::max(0L, long(coord[0]));
    const long last = std::min(long(m.dim[0]), coord[0] + long(m.box[0]));
    if (inside && first < last)
      f(offset, size_t(last - first) * element, address + first * long(element),
        size_t(first - coord[0]) * element);
    else
      f(offset, size_t(0), address, size_t(0));
    int i = 1;
    for (; i < m.rank; ++i) {
      if (++at[i] < m.box[i]) break;
      at[i] = 0;
    }
    if (i >= m.rank) return;
  }
}

void issue_load(std::unique_ptr<BulkLoad> load) {
  Block& b = *block;
  // Reading the target before its barrier completes must not give the right values by luck.
  if (b.opt.poison) {
    memset(b.arena + load->dst, 0xFF, load->bytes);
    async_wrote(load->dst, load->bytes);
  }
  watch::release(&load->issued);
  if (b.at_once())
    land_load(*load);
  else
    b.loads.push_back(std::move(load));
}

template <class T, class Float>
void add_as(unsigned char* to, const unsigned char* from, Float to_float) {
  T more;
  memcpy(&more, from, sizeof(T));
  read_modify_write(reinterpret_cast<T*>(to), [&](T old) { return to_float(old, more); });
}

void add_element(Element e, unsigned char* to, const unsigned char* from) {
  switch (e) {
    case Element::u8:
      fail("TMA reduce: no addition of bytes", {"TMA", 0});
    case Element::i32:
      return add_as<uint32_t>(to, from, [](uint32_t x, uint32_t y) { return x + y; });
    case Element::f32:
      return add_as<float>(to, from, [](float x, float y) { return x + y; });
    case Element::bf16:
      return add_as<__nv_bfloat16>(to, from, [](__nv_bfloat16 x, __nv_bfloat16 y) {
        return __float2bfloat16(__bfloat162float(x) + __bfloat162float(y));
      });
    case Element::f16:
      return add_as<__half>(to, from, [](__half x, __half y) {
        return __float2half(__half2float(x) + __half2float(y));
      });
  }
}

// The two steps of a store: reading the tile from shared memory, and writing it to the tensor.
void read_tile(BulkStore& s) {
  if (s.read) return;
  s.read = true;
  s.data.resize(tile_bytes(s.map));
  watch::As async(current->warp->async_identity);
  watch::reads(shared_pointer(s.src), s.data.size());
  for (uint32_t i = 0; i < s.data.size(); i += granule)
    memcpy(&s.data[i], shared_pointer(swizzled(s.src + i, s.map.swizzle)), granule);
  watch::release(&current->warp->async_done);
}

void write_tile(BulkStore& s) {
  read_tile(s);
  if (s.written) return;
  s.written = true;
  watch::As async(current->warp->async_identity);
  const size_t element = element_bytes(s.map.element);
  each_row(s.map, s.coord,
           [&](uint32_t offset, size_t inside, unsigned char* address, size_t before) {
             if (!inside) return;
             if (watch::forbidden(address, inside)) fail("TMA store: out of bounds", s.at);
             const unsigned char* from = &s.data[offset + before];
             if (!s.add) {
               memcpy(address, from, inside);
               watch::writes(address, inside);
             } else {
               for (size_t i = 0; i < inside; i += element)
                 add_element(s.map.element, address + i, from + i);
             }
           });
  watch::release(&current->warp->async_done);
}

void issue_store(const TensorMap& map, uint32_t src, const int* coord, bool add, Where at) {
  async_reads(src, tile_bytes(map), "a TMA store", at);
  BulkStore s{};
  s.map = map;
  std::copy(coord, coord + map.rank, s.coord);
  s.src = src;
  s.add = add;
  s.at = at;
  if (block->at_once()) {
    read_tile(s);
    write_tile(s);
  }
  self().stores_open.push_back(std::move(s));
}

}  // namespace

void land_load(BulkLoad& load) {
  Block& b = *block;
  watch::As tma(b.tma_identity);
  watch::acquire(&load.issued);
  std::vector<unsigned char> tile(load.bytes, 0);
  each_row(load.map, load.coord,
           [&](uint32_t offset, size_t inside, unsigned char* address, size_t before) {
             if (!inside) return;
             if (watch::forbidden(address, inside)) fail("TMA load: out of bounds", load.at);
             watch::reads(address, inside);
             memcpy(&tile[offset + before], address, inside);
           });
  for (uint32_t i = 0; i < load.bytes; i += granule)
    memcpy(b.arena + swizzled(load.dst + i, load.map.swizzle), &tile[i], granule);
  watch::writes(b.arena + load.dst, load.bytes);
  async_wrote(load.dst, load.bytes);
  complete_bytes(load.bar, load.bytes);
}

void tma_load(uint32_t dst, const TensorMap& map, uint32_t bar, const int* coord, int rank,
              Where at) {
  Quiet quiet;
  check_mbarrier(bar, at);
  check_tile(map, dst, rank, "TMA load", at);
  auto load = std::make_unique<BulkLoad>();
  load->map = map;
  std::copy(coord, coord + rank, load->coord);
  load->dst = dst;
  load->bar = bar;
  load->bytes = uint32_t(tile_bytes(map));
  load->at = at;
  issue_load(std::move(load));
}

void tma_store(const TensorMap& map, uint32_t src, const int* coord, int rank, bool add, Where at) {
  Quiet quiet;
  check_tile(map, src, rank, add ? "TMA reduce" : "TMA store", at);
  issue_store(map, src, coord, add, at);
}

// As the addition of a tile of one row.
void bulk_reduce_add(float* dst, uint32_t src, uint32_t bytes, Where at) {
  Quiet quiet;
  if (src % 16 || bytes % 16 || !bytes || reinterpret_cast<uintptr_t>(dst) % 16)
    fail("bulk reduce: address or size is not a multiple of 16", at);
  shared_check(src, bytes, "bulk reduce", at);
  TensorMap row{};
  row.base = dst;
  row.rank = 1;
  row.element = Element::f32;
  row.stride[0] = sizeof(float);
  row.dim[0] = row.box[0] = uint16_t(bytes / sizeof(float));
  if (row.box[0] != bytes / sizeof(float)) fail("bulk reduce: more than the twin takes", at);
  const int first = 0;
  issue_store(row, src, &first, true, at);
}

void tma_commit() {
  Quiet quiet;
  Fiber& f = self();
  f.store_groups.push_back(std::move(f.stores_open));
  f.stores_open.clear();
}

void tma_wait(int groups_left, bool only_read) {
  Quiet quiet;
  auto& groups = self().store_groups;
  for (size_t i = 0; i + size_t(groups_left) < groups.size(); ++i)
    for (BulkStore& s : groups[i]) only_read ? read_tile(s) : write_tile(s);
  if (!only_read)
    while (int(groups.size()) > groups_left) groups.pop_front();
  watch::acquire(&current->warp->async_done);
}

// A thread may exit before its stores are written to global memory, but not before they have read
// shared memory.
void finish_stores(Fiber& f) {
  if (!f.stores_open.empty())
    fail("thread exits with a TMA store never committed", f.stores_open[0].at);
  for (auto& group : f.store_groups)
    for (BulkStore& s : group)
      if (!s.read) fail("thread exits with a TMA store not waited for", s.at);
  for (auto& group : f.store_groups)
    for (BulkStore& s : group) write_tile(s);
  f.store_groups.clear();
  watch::acquire(&f.warp->async_done);
}

}  // namespace simt

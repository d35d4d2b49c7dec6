#include "ops/memory.h"

#include <string>
#include <utility>

#include "ops/error.h"

namespace p2r {

namespace {
// Size classes, four per power of two: rounding up leaves at most a fifth of a block unused, and a
// loop whose shapes vary a little reuses its blocks.
size_t size_class(size_t bytes) {
  constexpr size_t kSmallest = 512;
  if (bytes <= kSmallest) return kSmallest;
  size_t step = kSmallest / 4;
  while (step * 8 < bytes) step *= 2;
  return static_cast<size_t>(round_up(static_cast<int64_t>(bytes), static_cast<int64_t>(step)));
}
}  // namespace

void* Memory::allocate(size_t bytes) {
  const size_t capacity = size_class(bytes);
  void* data = nullptr;
  if (auto it = free_.lower_bound(capacity);
      it != free_.end() && it->first <= capacity + capacity / 4) {
    data = it->second;
    blocks_.at(data).entry = free_.extract(it);
  } else {
    data = raw_allocate(capacity);
    if (!data) {
      trim();
      data = raw_allocate(capacity);
    }
    if (!data)
      throw Error(Code::memory, "out of memory: " + std::to_string(bytes) + " bytes requested, " +
                                    std::to_string(live_) + " in use");
    try {
      blocks_[data].entry = free_.extract(free_.emplace(capacity, data));
    } catch (...) {
      blocks_.erase(data);
      raw_release(data);
      throw;
    }
    reserved_ += capacity;
  }
  blocks_.at(data).requested = bytes;
  live_ += bytes;
  if (live_ > peak_) peak_ = live_;
  return data;
}

void Memory::release(void* data) {
  Block& block = blocks_.at(data);
  live_ -= block.requested;
  block.requested = 0;
  free_.insert(std::move(block.entry));
}

void Memory::adopt(size_t bytes) {
  reserved_ += bytes;
  live_ += bytes;
  if (live_ > peak_) peak_ = live_;
}

void Memory::disown(size_t bytes) {
  reserved_ -= bytes;
  live_ -= bytes;
}

void Memory::trim() {
  drain();
  for (auto [capacity, data] : free_) {
    raw_release(data);
    blocks_.erase(data);
    reserved_ -= capacity;
  }
  free_.clear();
}

void Memory::release_everything() {
  for (auto& [data, block] : blocks_) raw_release(data);
  blocks_.clear();
  free_.clear();
  live_ = reserved_ = 0;
}

}  // namespace p2r

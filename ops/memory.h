// A caching allocator over a device's memory, with counters of its use, and temporary memory of one
// call.
//
// Reuse is ordered by the device's queue: a released block may be allocated again at once, although
// queued work still uses it, because work that is queued later runs later. Only the thread that
// queues work allocates and releases, so there is no lock.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <unordered_map>

#include "ops/integer.h"

namespace p2r {

class Memory {
 public:
  virtual ~Memory() = default;

  // Throws Code::memory when the device has no memory left even after the cache was emptied.
  virtual void* allocate(size_t bytes);
  virtual void release(void* block);
  // Returns every cached block to the system, once the queue is drained.
  void trim();

  // Counts memory that was not allocated here (mapped from another process) as in use, or no
  // longer.
  void adopt(size_t bytes);
  void disown(size_t bytes);

  size_t live() const { return live_; }
  size_t peak() const { return peak_; }
  size_t reserved() const { return reserved_; }
  void reset_peak() { peak_ = live_; }

 protected:
  virtual void* raw_allocate(size_t bytes) = 0;  // null when out of memory
  virtual void raw_release(void* block) = 0;
  virtual void drain() = 0;  // waits until no queued work uses released blocks
  // For destructors: releases live blocks too.
  void release_everything();

 private:
  using Free = std::multimap<size_t, void*>;  // by capacity
  struct Block {
    size_t requested = 0;
    Free::node_type entry;  // of a block in use: giving it back needs no memory
  };
  std::unordered_map<void*, Block> blocks_;
  Free free_;
  size_t live_ = 0, peak_ = 0, reserved_ = 0;
};

// Temporary memory of one call; counts towards the peak like everything else.
class Scratch {
 public:
  Scratch(Memory& memory, size_t bytes)
      : memory_(memory), data_(bytes ? memory.allocate(bytes) : nullptr) {}
  ~Scratch() {
    if (data_) memory_.release(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  Memory& memory_;
  void* data_;
};

// Divides one block into arrays aligned to 64 bytes, in the order in which they are taken. With a
// null base it hands out null pointers and only adds up the size, so that one layout function both
// sizes the block and divides it:
//
//   Workspace size(nullptr);
//   Buffers(size, ...);
//   Scratch scratch(memory, size.bytes());
//   Workspace workspace(scratch.as<char>());
//   const Buffers buffers(workspace, ...);
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* array = base_ ? reinterpret_cast<T*>(base_ + bytes_) : nullptr;
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return array;
  }
  size_t bytes() const { return static_cast<size_t>(bytes_); }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

}  // namespace p2r

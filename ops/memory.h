// The caching allocator in front of a device's memory, and its accounts.
//
// Stream-ordered: a block may be handed out again as soon as it is released, though queued work
// still uses it, because whatever is queued later runs later. Only the thread that queues work
// allocates and releases, so there is no lock.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <unordered_map>

namespace p2r {

class Memory {
 public:
  virtual ~Memory() = default;

  // Throws Code::memory when, after the cache was emptied, the device still has no room.
  virtual void* allocate(size_t bytes);
  virtual void release(void* block);
  // Gives every cached block back to the system, once the queue is drained.
  void trim();

  // Memory that is not from here, but in use like what is: it counts as if it were.
  void adopt(size_t bytes);
  void disown(size_t bytes);

  size_t live() const { return live_; }
  size_t peak() const { return peak_; }
  size_t reserved() const { return reserved_; }
  void reset_peak() { peak_ = live_; }

 protected:
  virtual void* raw_allocate(size_t bytes) = 0;  // null when there is no room
  virtual void raw_release(void* block) = 0;
  virtual void drain() = 0;  // waits until no queued work uses released blocks
  // For destructors: gives back live blocks too.
  void release_everything();

 private:
  struct Block {
    size_t capacity = 0, asked = 0;
  };
  std::unordered_map<void*, Block> blocks_;
  std::multimap<size_t, void*> free_;  // by capacity
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

}  // namespace p2r

// Several temporary arrays of one call in one block of device memory.
#pragma once
#include <vector>

#include "ops/backend.h"

namespace p2r::cuda {

// Scratch that layout(workspace) divides: it runs once to add up the size, when it takes null
// pointers, and once for the arrays.
class ScratchWorkspace {
 public:
  template <class Layout>
  ScratchWorkspace(Device& device, const Layout& layout) : scratch_(device, size_of(layout)) {
    Workspace workspace(scratch_.as<char>());
    layout(workspace);
  }

 private:
  template <class Layout>
  static size_t size_of(const Layout& layout) {
    Workspace workspace(nullptr);
    layout(workspace);
    return workspace.bytes();
  }

  const Scratch scratch_;
};

// Takes an array for host data and queues its upload, except in the pass that adds up the size.
template <class T>
const T* upload(Device& device, Workspace& workspace, const std::vector<T>& values) {
  T* array = workspace.take<T>(static_cast<int64_t>(values.size()));
  if (array && !values.empty()) device.upload(array, values.data(), values.size() * sizeof(T));
  return array;
}

}  // namespace p2r::cuda

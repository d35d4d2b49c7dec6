// What the checks against the tables share: the counts, launches, and memory for them. On the twin,
// and check_primitives on a device as well.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "cuda/ptx.cuh"
#include "test/twin/hopper/tables.h"

namespace hopper {

using namespace p2r::cuda;
using bf16 = __nv_bfloat16;

// Comparisons under one name.
struct Group {
  long compared = 0, different = 0;
  std::string first;

  // The detail, in printf's form, is written for the first difference only.
  template <class... A>
  void expect(bool same, const char* detail, A... values) {
    ++compared;
    if (same || different++) return;
    char text[400];
    std::snprintf(text, sizeof text, detail, values...);
    first = text;
  }
};

class Checks {
 public:
  // Kept for the whole run.
  Group& operator[](const std::string& name) { return groups_[name]; }
  // Prints the groups with differences, or all if `verbose`. Returns whether all is equal.
  bool report(bool verbose) const {
    long compared = 0, different = 0;
    for (const auto& [name, group] : groups_) {
      compared += group.compared;
      different += group.different;
      if (group.different)
        std::printf("FAIL %s: %ld of %ld differ, first: %s\n", name.c_str(), group.different,
                    group.compared, group.first.c_str());
      else if (verbose)
        std::printf("ok   %s: %ld\n", name.c_str(), group.compared);
    }
    std::printf("%ld compared, %ld differ\n", compared, different);
    return compared > 0 && different == 0;
  }

 private:
  std::map<std::string, Group> groups_;
};

// Runs one block, with as much dynamic shared memory as there is room for beside static arrays. An
// error counts as a difference.
template <class... P, class... A>
void run(Group& group, void (*kernel)(P...), int threads, A... args) {
  try {
    launch(kernel, 1, unsigned(threads), 224 * 1024, nullptr, args...);
#ifndef P2R_TWIN
    if (const cudaError_t e = cudaDeviceSynchronize(); e != cudaSuccess)
      throw p2r::Error(p2r::Code::cuda, cudaGetErrorString(e));
#endif
  } catch (const std::exception& e) {
    group.expect(false, "it does not run: %s", e.what());
  }
}

// An array for kernels and the host, which TMA and cp.async may read: at a multiple of 64 bytes.
template <class T>
class Array {
 public:
  explicit Array(size_t size) : size_(size) {
    const size_t bytes = (size * sizeof(T) + 63) / 64 * 64;
#ifdef P2R_TWIN
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
#else
    if (const cudaError_t e = cudaMallocManaged(&data_, bytes); e != cudaSuccess)
      throw p2r::Error(p2r::Code::cuda, cudaGetErrorString(e));
#endif
    std::memset(static_cast<void*>(data_), 0, bytes);
  }
  ~Array() {
#ifdef P2R_TWIN
    std::free(data_);
#else
    cudaFree(data_);
#endif
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  T* data() { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_[i]; }

 private:
  T* data_ = nullptr;
  size_t size_;
};

// The tables' tiles begin at `base`, a shared address; dynamic memory begins below it.
__device__ inline unsigned char* at_address(unsigned char* dynamic, uint32_t address) {
  return dynamic + (address - ptx::smem_u32(dynamic));
}

template <class T>
uint16_t bits_of(float value) {
  return uint16_t(ptx::pack2<T>(value, 0));
}

// 16-bit codes of elements.
class Codes : public Array<uint16_t> {
 public:
  template <class F>
  Codes(size_t count, F code) : Array(count) {
    for (size_t i = 0; i < count; ++i) (*this)[i] = uint16_t(code(i));
  }
  const bf16* as_bf16() { return reinterpret_cast<const bf16*>(data()); }
};

// primitives.cpp, attention.cpp, gemm.cpp, mma.cpp, rules.cpp
void check_primitives(const Tables& tables, Checks& checks);
void check_attention(const Tables& tables, Checks& checks);
void check_gemm(const Tables& tables, Checks& checks);
void check_mma_kernels(const Tables& tables, Checks& checks);
void check_rules(const Tables& tables, Checks& checks);

// Compares the descriptor of a form's tile; fields that the hardware does not read may differ.
void expect_descriptor(Group& group, const Form& form, uint64_t got, uint64_t want);

}  // namespace hopper

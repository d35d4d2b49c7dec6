// Memory for the probe, the device's or the twin's.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/ptx.cuh"

namespace probe {

__host__ __device__ inline float small_value(uint32_t i) {
  return float(int(i * 2654435761u >> 20) % 15 - 7);
}

inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw p2r::Error(p2r::Code::cuda, cudaGetErrorString(status));
}

template <class T>
class Memory {
 public:
  explicit Memory(size_t n) : size_(n) {
    check(cudaMalloc(reinterpret_cast<void**>(&data_), n * sizeof(T)));
  }
  ~Memory() { cudaFree(data_); }
  Memory(const Memory&) = delete;
  T* get() { return data_; }
  void clear() { check(cudaMemsetAsync(data_, 0, size_ * sizeof(T), nullptr)); }
  void fill(const std::vector<T>& from) {
    check(cudaMemcpyAsync(data_, from.data(), size_ * sizeof(T), cudaMemcpyDefault, nullptr));
    check(cudaStreamSynchronize(nullptr));
  }
  // FNV-1a over the words.
  unsigned long long hash() {
    std::vector<T> words(size_);
    check(cudaMemcpyAsync(words.data(), data_, size_ * sizeof(T), cudaMemcpyDefault, nullptr));
    check(cudaStreamSynchronize(nullptr));
    unsigned long long h = 14695981039346656037ull;
    for (T w : words) h = (h ^ w) * 1099511628211ull;
    return h;
  }

 private:
  T* data_ = nullptr;
  size_t size_;
};

}  // namespace probe

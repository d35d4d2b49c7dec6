// An operation's view of a tensor: contiguous, row-major memory of one type on one device.
//
// Letters, everywhere: T tokens, H heads, D head dimension, N rows, V vocabulary, C channels,
// B sequences, P patches. Sizes and offsets are 64 bits wide.
#pragma once
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

namespace p2r {

enum class DType : uint8_t { f32, f16, bf16, i32, u8 };

constexpr size_t size_of(DType t) {
  return t == DType::f32 || t == DType::i32 ? 4 : t == DType::u8 ? 1 : 2;
}
constexpr const char* to_string(DType t) {
  constexpr const char* names[] = {"f32", "f16", "bf16", "i32", "u8"};
  return names[static_cast<int>(t)];
}

constexpr int kMaxRank = 8;
// Of a tensor: any product of its axes, and its bytes, are exact in 64 bits and in a double.
constexpr int64_t kMaxElements = int64_t{1} << 50;

struct Shape {
  int rank = 0;
  int64_t dim[kMaxRank] = {};

  Shape() = default;
  Shape(std::initializer_list<int64_t> dims) {
    for (int64_t d : dims) dim[rank++] = d;
  }
  int64_t operator[](int i) const { return dim[i < 0 ? rank + i : i]; }
  int64_t size() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= dim[i];
    return n;
  }
  // Whether the product of the axes, those of size 0 left out, is at most kMaxElements: so the
  // product of some of the axes does not overflow, even where the tensor is empty.
  bool is_representable() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) {
      if (dim[i] > 0 && n > kMaxElements / dim[i]) return false;
      if (dim[i] > 0) n *= dim[i];
    }
    return true;
  }
  bool operator==(const Shape& o) const {
    if (rank != o.rank) return false;
    for (int i = 0; i < rank; ++i)
      if (dim[i] != o.dim[i]) return false;
    return true;
  }
};

struct View {
  void* data = nullptr;  // null: an optional tensor that was not given
  DType dtype = DType::f32;
  Shape shape;

  explicit operator bool() const { return data != nullptr; }
  int64_t size() const { return shape.size(); }
  size_t bytes() const { return static_cast<size_t>(size()) * size_of(dtype); }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  // Where element i of the row-major order begins.
  char* element(int64_t i) const { return as<char>() + i * static_cast<int64_t>(size_of(dtype)); }
};

// How an operation uses a tensor. The types let a generic visitor of Args::fields() find what a
// call reads and writes (ops/recording.h).
struct In : View {};
struct Out : View {};
struct InOut : View {};

// Host data that describes the structure of a batch: cuSeqlens, indices, groups, grids. Checked at
// the call, so kernels rely on it.
using Ints = std::vector<int64_t>;

}  // namespace p2r

// Copies in another arrangement: threads take pieces of rows, or tiles of a transposed matrix,
// whose lines of memory stay in the first-level cache on both sides.
#include "ops/rearrange.h"

#include <algorithm>
#include <cstring>

#include "cpu/device.h"
#include "ops/integer.h"

namespace p2r::cpu {

namespace {

constexpr int64_t kPiece = 1 << 18;  // bytes of a long row that are one item
constexpr int64_t kTaskBytes = 1 << 16;
constexpr int64_t kTile = 32;

void copy_rows(CpuDevice& cpu, const char* from, int64_t from_pitch, char* to, int64_t to_pitch,
               int64_t rows, int64_t bytes) {
  const int64_t pieces = ceil_div(bytes, kPiece);
  const int64_t grain = std::max<int64_t>(1, kTaskBytes / (std::min(bytes, kPiece) + 1));
  cpu.launch(rows * pieces, grain, [=](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / pieces, first = i % pieces * kPiece;
      std::memcpy(to + row * to_pitch + first, from + row * from_pitch + first,
                  static_cast<size_t>(std::min(kPiece, bytes - first)));
    }
  });
}

template <int bytes>
void copy_run(char* to, const char* from) {
  std::memcpy(to, from, bytes);
}

// Tiles of matrices; copy(to, from) copies a run.
template <class Copy>
void transpose_tiles(CpuDevice& cpu, const TransposeArgs& a, const TransposeAxes& t,
                     const Copy& copy) {
  const int64_t rows = ceil_div(t.n, kTile), columns = ceil_div(t.m, kTile);
  const int64_t grain = std::max<int64_t>(1, kTaskBytes / (kTile * kTile * t.bytes + 1));
  cpu.launch(t.matrices() * rows * columns, grain, [=](int64_t begin, int64_t end, int) {
    const char* x = a.x.as<const char>();
    char* out = a.out.as<char>();
    for (int64_t k = begin; k < end; ++k) {
      const int64_t matrix = k / (rows * columns), tile = k % (rows * columns);
      const int64_t top = tile / columns * kTile, left = tile % columns * kTile;
      const int64_t below = std::min(t.n, top + kTile), right = std::min(t.m, left + kTile);
      for (int64_t j = left; j < right; ++j)
        for (int64_t i = top; i < below; ++i)
          copy(out + t.out(matrix, i, j) * t.bytes, x + t.in(matrix, i, j) * t.bytes);
    }
  });
}

}  // namespace

void concat(const ConcatArgs& a, Device& device) {
  const std::vector<PartRows> places = part_rows(a.out, a.parts, a.axis);
  for (size_t k = 0; k < places.size(); ++k) {
    const PartRows& p = places[k];
    copy_rows(cpu_device(device), a.parts[k].as<const char>(), p.bytes, a.out.as<char>() + p.first,
              p.pitch, p.rows, p.bytes);
  }
}

void split(const SplitArgs& a, Device& device) {
  const std::vector<PartRows> places = part_rows(a.x, a.parts, a.axis);
  for (size_t k = 0; k < places.size(); ++k) {
    const PartRows& p = places[k];
    copy_rows(cpu_device(device), a.x.as<const char>() + p.first, p.pitch, a.parts[k].as<char>(),
              p.bytes, p.rows, p.bytes);
  }
}

void transpose(const TransposeArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const TransposeAxes t(a);
  if (!a.out.size()) return;
  if (t.bytes == 1)
    transpose_tiles(cpu, a, t, copy_run<1>);
  else if (t.bytes == 2)
    transpose_tiles(cpu, a, t, copy_run<2>);
  else if (t.bytes == 4)
    transpose_tiles(cpu, a, t, copy_run<4>);
  else
    transpose_tiles(cpu, a, t, [bytes = static_cast<size_t>(t.bytes)](char* to, const char* from) {
      std::memcpy(to, from, bytes);
    });
}

}  // namespace p2r::cpu

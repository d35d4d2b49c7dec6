// Moving and summing rows: embeddings and pooling.
//
//   gather_rows     out[i] = x[index[i]]
//   gather_rows_backward   dX[r] = Σ dOut[i] over the i with index[i] = r, in rising order of i
//   scatter_rows    out = x, but out[index[i]] = y[i], or 0 where there is no y
//   scatter_add_rows       out[r] = x[r] + Σ y[i] over the i with index[i] = r, in rising order of
//   i mean_pool       out[b] = Σ x[t] / n over the n tokens t of sequence b; 0 for an empty one
//   mean_pool_backward     dX[t] = dOut[b] / n
//
// gather_rows: x [R, ...] of any type, index [n] in
// [0, R), copied bit for bit. gather_rows_backward: dOut [n, ...] f32 | f16 | bf16, dX [rows, ...]
// as dOut. scatter_rows: x [R, ...] of any type, y [n, ...] as x, index without repeats.
// scatter_add_rows: x [R, ...] f32 | f16 | bf16, y [n, ...] as x, repeats allowed. mean_pool: x [T,
// C] f32 | f16 | bf16, out [B, C] as x. Sums are taken in f32, in runs of kSumRun rows whose sums
// are then added, so that the error grows with the square root of the number of rows where a plain
// sum's grows with the number; rounded once. The order is fixed and no float atomics are used:
// results do not depend on the thread count.
#pragma once
#include <tuple>
#include <vector>

#include "ops/tensor.h"

namespace p2r {

constexpr int64_t kSumRun = 64;

struct GatherRowsArgs {
  In x;
  Ints index;
  Out out;
  auto fields() { return std::tie(x, index, out); }
};

struct GatherRowsBackwardArgs {
  In d_out;
  Ints index;
  Out d_x;
  auto fields() { return std::tie(d_out, index, d_x); }
};

struct ScatterRowsArgs {
  In x, y;  // y may be absent
  Ints index;
  Out out;
  auto fields() { return std::tie(x, y, index, out); }
};

struct ScatterAddRowsArgs {
  In x, y;
  Ints index;
  Out out;
  auto fields() { return std::tie(x, y, index, out); }
};

struct MeanPoolArgs {
  In x;
  Ints cu_seqlens;
  Out out;
  auto fields() { return std::tie(x, cu_seqlens, out); }
};

struct MeanPoolBackwardArgs {
  In d_out;
  Ints cu_seqlens;
  Out d_x;
  auto fields() { return std::tie(d_out, cu_seqlens, d_x); }
};

// The elements of one row of [R, ...].
inline int64_t row_size(const Shape& shape) {
  int64_t n = 1;
  for (int i = 1; i < shape.rank; ++i) n *= shape.dim[i];
  return n;
}

// Which positions hold each of `rows` values, by counting sort: those of r are
// list[offsets[r]] .. list[offsets[r + 1] - 1], rising.
struct Inverse {
  Ints offsets, list;
};
inline Inverse invert(const Ints& index, int64_t rows) {
  Inverse inverse{Ints(static_cast<size_t>(rows) + 1), Ints(index.size())};
  for (const int64_t r : index) ++inverse.offsets[static_cast<size_t>(r) + 1];
  for (size_t r = 0; r < static_cast<size_t>(rows); ++r)
    inverse.offsets[r + 1] += inverse.offsets[r];
  Ints next(inverse.offsets.begin(), inverse.offsets.end() - 1);
  for (size_t i = 0; i < index.size(); ++i)
    inverse.list[static_cast<size_t>(next[static_cast<size_t>(index[i])]++)] =
        static_cast<int64_t>(i);
  return inverse;
}

// Which row of y each of `rows` rows is replaced with: -1 for none.
inline Ints sources_of(const Ints& index, int64_t rows) {
  Ints source(static_cast<size_t>(rows), -1);
  for (size_t i = 0; i < index.size(); ++i)
    source[static_cast<size_t>(index[i])] = static_cast<int64_t>(i);
  return source;
}

}  // namespace p2r

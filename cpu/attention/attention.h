// What the CPU's attention kernels share: a call's shape and layout, its tasks, and helpers that
// bring rows of q, k, v into the form that the products of cpu/simd/gemm.cpp read.
//
//   attention.cpp        the operations: cut sequences into tasks, choose a kernel, queue the tasks
//   forward.cpp          online softmax over blocks of keys, for sequences of any length
//   short_sequences.cpp  forward of sequences whose row of P stays in L1: all keys at once
//   backward.cpp         dQ, dK, dV
//   mass.cpp             column sums of P
//   grouped*             causal, with grouped key heads, shared or cached keys: see grouped.h
//   rows.cpp             rotary embedding, conversion to panel words, transposed stores, prefetch
//
// A task is a span of queries against a span of keys of one sequence, and runs for one head on one
// thread, in buffers of that thread. Softmax runs on tiles [rows][NR] of logits with a query or a
// key per SIMD lane, in place between two products (cpu/simd/attention.cpp).
//
// bf16 on a CPU with AVX512-BF16: all panels hold pairs of bf16, so P and dS are rounded to bf16 as
// operands, by up to 2^-8 of each; sums, lse and delta stay f32.
#pragma once
#include <algorithm>

#include "cpu/device.h"
#include "cpu/gemm.h"
#include "ops/attention.h"
#include "ops/integer.h"

namespace p2r::cpu::attention_kernels {

constexpr int64_t kQueryBlock = 192;  // backward and mass: queries of a block
constexpr int64_t kKeyBlock = 192;    // forward: keys of a product; a panel of P^T fills half of L1
constexpr int64_t kTaskKeys = 256;    // backward of a long sequence, and mass: keys of a task
constexpr int64_t kMaxDim = 128;

// A range of tokens of one sequence.
struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
  // At most n tokens, starting at `first`.
  Span part(int64_t first, int64_t n) const { return {first, std::min(first + n, end)}; }
};

struct Task {
  Span queries, keys;
  double work() const { return static_cast<double>(queries.size()) * keys.size(); }
};

// A task and a head of it; no task: none.
struct HeadTask {
  const Task* task;
  int64_t head;
};

// One head of some tokens of a tensor, in a form that can be packed.
struct Rows {
  DType dtype;
  const void* data;
  int64_t stride, step = 1;  // elements from row to row, and along a row

  Rows transposed() const { return {dtype, data, step, stride}; }
};

// What all tasks of a call share.
struct Call {
  const Simd* simd;
  AttentionLayout in;
  const float *cos, *sin;  // null: no rotary embedding
  float scale;
  bool pairs;         // bf16 in panels of pairs
  int mr, nr, width;  // the GEMM's register tile; f32 lanes of a vector

  Call(const CpuDevice& cpu, const AttentionLayout& layout, const View& cos_table,
       const View& sin_table, double scale);

  int64_t size() const { return static_cast<int64_t>(size_of(in.dtype)); }
  // Elements from token to token of out and d_out.
  int64_t out_row() const { return in.heads * in.head_dim; }
  int64_t lanes(int64_t n) const { return std::min<int64_t>(round_up(n, width), nr); }
  int64_t panels(int64_t n) const { return ceil_div(n, nr); }
  // Panel words of k steps of a product.
  int64_t depth(int64_t k) const { return pairs ? ceil_div(k, 2) : k; }
  // Words of a row of V: an odd number of cache lines, so that rows do not map to the same L1 sets.
  int64_t value_stride() const { return round_up(in.head_dim, 16) | 16; }
  // The running maximum's start, below all scaled logits. With a scale of 0 they are all equal, and
  // 0 times infinity would be a NaN.
  float initial_max() const;
  // Whether outputs have a type that a product can write: f32, or bf16 with pairs.
  bool writes_in_place() const { return in.dtype == DType::f32 || pairs; }

  // The packing and the product of simd.h, with the call's kind of panels.
  void pack_a(const Rows& x, int64_t m, int64_t k, float* out) const {
    simd->pack_a(pairs, x.dtype, x.data, x.stride, x.step, m, k, out);
  }
  void pack_b(const Rows& x, int64_t n, int64_t k, float* out) const {
    simd->pack_b(pairs, x.dtype, x.data, x.step, x.stride, k, n, out);
  }
  void multiply(int64_t m, int64_t n, int64_t k, const float* a, const float* b, float* c,
                int64_t ldc, bool accumulate, Prefetch* prefetch = nullptr) const {
    simd->gemm_panels(pairs, m, n, k, a, b, c, ldc, accumulate, prefetch);
  }
};

// rows.cpp

// One head of some tokens of x, whose tokens are `row` elements apart.
Rows rows_of(const Call& c, const char* x, int64_t row, int64_t head, Span tokens);
// The same of q or k, rotated by the rotary tables and rounded to its type in `buffer`, if there
// are tables.
Rows rotated_rows(const Call& c, const char* x, int64_t head, Span tokens, float* buffer);
// One head of a token of q or k, rotated and rounded to its type; `to` may be `from`.
void rotate_row(const Call& c, int64_t token, const char* from, char* to);
// n rows of D entries converted to panel words along D, `stride` words apart in `buffer`.
Rows to_words(const Call& c, const Rows& x, int64_t n, int64_t stride, float* buffer);
// V as the B operand of P V: a row of D words for each key, or pair of keys, `stride` words apart.
void value_words(const Call& c, const Rows& v, int64_t keys, int64_t stride, float* buffer);
// Writes x^T, [D][nr] with a token per lane, as rows of a tensor, rotated back if cos is given; the
// tables start at the first token. `buffer` has D floats per token.
void store_transposed(const Call& c, const float* x, int64_t tokens, float* buffer, char* out,
                      int64_t row, const float* cos, const float* sin);
// Prefetches one head of some tokens of x, and of y unless it is null.
Prefetch prefetch_rows(const Call& c, const char* x, const char* y, int64_t row, int64_t head,
                       Span tokens);

// Buffers of a forward task of one head, for both forward kernels.
struct ForwardBuffers {
  float* rotated;            // [tokens][D] of q or k, if there are rotary tables
  float *q, *k, *v;          // operands as words; unused where inputs are read in place
  float* s;                  // a tile of logits, then P
  float* o;                  // [queries][D], outputs before they are converted
  float *max, *sum;          // per query, of the online softmax
  float* rescale;            // of a panel's queries
  float *lse, *inverse_sum;  // of a panel's queries
};

// forward.cpp
ForwardBuffers forward_buffers(const Call& c, Workspace& workspace, int64_t max_queries);
void forward(const Call& c, const ForwardBuffers& w, const Task& task, int64_t head,
             const HeadTask& next, char* out, float* lse);

// short_sequences.cpp
bool is_short(const Call& c, int64_t keys);
ForwardBuffers short_forward_buffers(const Call& c, Workspace& workspace, int64_t max_tokens);
void forward_short(const Call& c, const ForwardBuffers& w, const Task& task, int64_t head,
                   const HeadTask& next, char* out, float* lse);

// backward.cpp
enum Gradients { kDq = 1, kDkDv = 2 };  // flags: what a pass computes

struct BackwardTensors {
  const char *d_out, *out;
  const float* lse;
  AttentionLayout grad;  // d_q, d_k, d_v
};

// Buffers of a backward task of one head, whose dK and dV need at most `keys` keys at once.
struct BackwardBuffers {
  float *rotated, *q, *q_t, *d_out, *d_out_t, *delta, *s, *d_s, *d_s_rows, *d_q;
  float *k, *v, *k_rows, *d_k, *d_v;    // of every panel of keys, or of a group of them
  int64_t panel_floats, k_rows_floats;  // of a panel of d_k and d_v, and of k_rows
  int64_t query_stride, d_s_stride;     // words of a row of q and d_out, and of d_s_rows

  BackwardBuffers(const Call& c, Workspace& workspace, int gradients, int64_t keys);
};

void backward(const Call& c, const BackwardBuffers& w, int gradients, const Task& task,
              int64_t head, const BackwardTensors& t);
// The longest sequence whose backward pass is one task per head.
int64_t max_single_task_tokens(const Call& c);

// mass.cpp
struct MassBuffers {
  float *rotated, *q, *k, *s, *mass;

  MassBuffers(const Call& c, Workspace& workspace);
};

void mass(const Call& c, const MassBuffers& w, const Task& task, int64_t head, const float* lse,
          float* out);

}  // namespace p2r::cpu::attention_kernels

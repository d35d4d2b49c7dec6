// Attention with any of AttentionKeys, grouped key heads, or keys in pages: kernels whose tasks are
// rows, one for each query and each query head of a key head's group, so that a key is read once
// for all of them.
//
//   grouped_forward.cpp   forward, of attention and of cached_attention
//   grouped_backward.cpp  dQ, dK, dV
//
// Logical keys: a sequence's keys are numbered from 0 in the order of ops/attention.h, wherever
// they stand. Blocks and chunks of keys begin at multiples of their sizes in this order, whatever
// the queries are, and a key that a row does not see adds exactly nothing to its sums. So a row's
// results depend on its q and on the keys that it sees alone.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/attention/attention.h"

namespace p2r::cpu::attention_kernels {

// Keys of an online softmax; chunks are merged in order.
constexpr int64_t kKeyChunk = 4 * kKeyBlock;

// Consecutive logical keys of which each stands `key_row` elements after the one before.
struct KeyRun {
  int64_t key, count;  // the first logical key
  int64_t at;          // elements from the pointers of KeyRows to its head 0
};

struct GroupedSequence {
  int64_t query, queries;  // rows of q
  int64_t keys;
  int64_t always, own;  // keys that every query sees, and those after them
  size_t first_run;     // of Grouped::runs

  int64_t visible(int64_t i, bool causal) const {
    return causal ? always + std::clamp<int64_t>(i + 1 + own - queries, 0, own) : keys;
  }
};

// What all tasks of a call share: the queries as in Call, and where keys stand.
struct Grouped {
  Call c;
  const char *k, *v;
  int64_t key_row, key_head;  // elements from row to row, and from key head to key head
  int64_t key_heads, group;
  bool causal = false;
  std::vector<GroupedSequence> sequences;
  std::vector<KeyRun> runs;

  explicit Grouped(const Call& call);  // without sequences
  Grouped(const Call& call, const AttentionKeys& keys, const Ints& cu_seqlens);
  const char* queries() const { return c.in.q; }
  int64_t max_keys() const;
};

// Queries of a sequence, from query `first` of it on.
struct GroupedTask {
  size_t sequence;
  int64_t first, queries;
};

// At most max_queries of every sequence.
std::vector<GroupedTask> make_tasks(const Grouped& g, int64_t max_queries);
// The rows of a task, one for each query and each head of the group: [queries][group][D] of x, with
// `row` elements from token to token, rotated if there are tables and `rotate`.
Rows gather_queries(const Grouped& g, const GroupedTask& t, const char* x, int64_t row,
                    int64_t key_head, bool rotate, float* buffer);
// Keys block.begin .. block.end - 1 of a sequence as rows of k or v: in place where they are one
// run, otherwise in `buffer`.
Rows gather_keys(const Grouped& g, const GroupedSequence& s, const char* x, Span block,
                 int64_t key_head, bool rotate, float* buffer);

void grouped_attention(CpuDevice& cpu, std::shared_ptr<const Grouped> g, char* out, float* lse);
void grouped_attention_backward(CpuDevice& cpu, std::shared_ptr<const Grouped> g,
                                const BackwardTensors& t);

}  // namespace p2r::cpu::attention_kernels

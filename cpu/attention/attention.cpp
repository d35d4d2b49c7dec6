// The operations attention, attention_backward and attention_mass on the CPU: cuts the sequences
// into tasks, one per span of queries or keys, and queues a kernel of this folder for every task
// and head.
#include "cpu/attention/attention.h"

#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/attention/grouped.h"

namespace p2r::cpu {

namespace attention_kernels {

namespace {

// Forward: a task's queries, whose outputs stay in L2; fewer where there would be too few tasks.
constexpr int64_t kMaxQueries = 512, kMinQueries = 64;
// Multiply-adds of a chunk of tasks: some 25 windows of 64 tokens, so that most of the rows that a
// thread prefetches are its own next ones.
constexpr double kChunkWork = 1.6e7;

enum class Cut { queries, keys };

// One task for every `step` tokens of a sequence along one side. Long ones first, so that no thread
// is left with a long one at the end.
std::vector<Task> make_tasks(const Ints& cu_seqlens, Cut side, int64_t step) {
  std::vector<Task> tasks;
  for (size_t s = 1; s < cu_seqlens.size(); ++s) {
    const Span sequence{cu_seqlens[s - 1], cu_seqlens[s]};
    for (int64_t first = sequence.begin; first < sequence.end; first += step) {
      const Span part = sequence.part(first, step);
      tasks.push_back(side == Cut::queries ? Task{part, sequence} : Task{sequence, part});
    }
  }
  const auto longer = [](const Task& a, const Task& b) { return a.work() > b.work(); };
  if (!std::is_sorted(tasks.begin(), tasks.end(), longer))
    std::stable_sort(tasks.begin(), tasks.end(), longer);
  return tasks;
}

// Queues f(task, head, workspace, next) for every task and head, each thread with a workspace of
// `bytes`; `next` is what this thread will most likely execute next, if all threads are equally
// fast.
template <class F>
void launch_tasks(CpuDevice& cpu, const Call& c, std::vector<Task> tasks, size_t bytes, F f) {
  const int64_t items = static_cast<int64_t>(tasks.size()) * c.in.heads;
  if (!items) return;
  double work = 0;
  for (const Task& t : tasks) work += t.work() * 2 * c.in.head_dim;
  const double average = work / static_cast<double>(tasks.size());
  const int64_t max_grain = std::max<int64_t>(1, items / (4 * cpu.threads()));
  const int64_t grain =
      std::clamp<int64_t>(static_cast<int64_t>(kChunkWork / average), 1, max_grain);
  const Scratch scratch = cpu.scratch(bytes * cpu.threads());
  cpu.launch(
      items, grain,
      [=, heads = c.in.heads, memory = scratch.as<char>(), others = (cpu.threads() - 1) * grain,
       tasks = std::move(tasks)](int64_t begin, int64_t end, int thread) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t next = i + 1 < end ? i + 1 : end + others;
          f(tasks[i / heads], i % heads, Workspace(memory + thread * bytes),
            HeadTask{next < items ? &tasks[next / heads] : nullptr, next % heads});
        }
      });
}

// The bytes that `take_buffers` takes of a workspace.
template <class F>
size_t bytes_of(F take_buffers) {
  Workspace size(nullptr);
  take_buffers(size);
  return size.bytes();
}

}  // namespace

Call::Call(const CpuDevice& cpu, const AttentionLayout& layout, const View& cos_table,
           const View& sin_table, double scale)
    : simd(&cpu.simd()),
      in(layout),
      cos(cos_table.as<float>()),
      sin(sin_table.as<float>()),
      scale(static_cast<float>(scale)),
      pairs(cpu.features().bf16 && layout.dtype == DType::bf16),
      width(cpu.simd().vector_width()) {
  simd->gemm_tile_size(&mr, &nr);
}

float Call::initial_max() const { return scale == 0 ? 0 : std::copysign(HUGE_VALF, -scale); }

}  // namespace attention_kernels

using namespace attention_kernels;

void attention(const AttentionArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const Call c(cpu, attention_layout(a.q, a.k, a.v, a.qkv), a.cos, a.sin, a.scale);
  if (!sees_own_sequence(c.in, a.keys)) {
    grouped_attention(cpu, std::make_shared<const Grouped>(c, a.keys, a.cu_seqlens),
                      a.out.as<char>(), a.lse.as<float>());
    return;
  }
  int64_t max_queries = kMaxQueries, longest = 0, longest_short = 0;
  for (size_t i = 1; i < a.cu_seqlens.size(); ++i) {
    const int64_t keys = a.cu_seqlens[i] - a.cu_seqlens[i - 1];
    int64_t& so_far = is_short(c, keys) ? longest_short : longest;
    so_far = std::max(so_far, keys);
  }
  std::vector<Task> tasks = make_tasks(a.cu_seqlens, Cut::queries, max_queries);
  while (max_queries > kMinQueries &&
         static_cast<int64_t>(tasks.size()) * c.in.heads < 4 * cpu.threads())
    tasks = make_tasks(a.cu_seqlens, Cut::queries, max_queries /= 2);
  const int64_t queries = std::min(max_queries, longest);
  const size_t bytes =
      std::max(bytes_of([&](Workspace& w) { forward_buffers(c, w, queries); }),
               bytes_of([&](Workspace& w) { short_forward_buffers(c, w, longest_short); }));
  launch_tasks(cpu, c, std::move(tasks), bytes,
               [c, queries, longest_short, out = a.out.as<char>(), lse = a.lse.as<float>()](
                   const Task& task, int64_t head, Workspace workspace, const HeadTask& next) {
                 if (is_short(c, task.keys.size()))
                   forward_short(c, short_forward_buffers(c, workspace, longest_short), task, head,
                                 next, out, lse);
                 else
                   forward(c, forward_buffers(c, workspace, queries), task, head, next, out, lse);
               });
}

void attention_backward(const AttentionBackwardArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const Call c(cpu, attention_layout(a.q, a.k, a.v, a.qkv), a.cos, a.sin, a.scale);
  const BackwardTensors tensors{a.d_out.as<char>(), a.out.as<char>(), a.lse.as<float>(),
                                attention_layout(a.d_q, a.d_k, a.d_v, a.d_qkv)};
  if (!sees_own_sequence(c.in, a.keys)) {
    grouped_attention_backward(cpu, std::make_shared<const Grouped>(c, a.keys, a.cu_seqlens),
                               tensors);
    return;
  }
  const auto pass = [&](int gradients, std::vector<Task> tasks, int64_t keys) {
    launch_tasks(cpu, c, std::move(tasks),
                 bytes_of([&](Workspace& w) { BackwardBuffers(c, w, gradients, keys); }),
                 [=](const Task& task, int64_t head, Workspace workspace, const HeadTask&) {
                   backward(c, BackwardBuffers(c, workspace, gradients, keys), gradients, task,
                            head, tensors);
                 });
  };
  const int64_t max_single = max_single_task_tokens(c);
  std::vector<Task> single, by_keys, by_queries;
  for (const Task& t : make_tasks(a.cu_seqlens, Cut::queries, INT64_MAX / 2))
    if (t.keys.size() <= max_single) single.push_back(t);
  for (const Task& t : make_tasks(a.cu_seqlens, Cut::keys, kTaskKeys))
    if (t.queries.size() > max_single) by_keys.push_back(t);
  for (const Task& t : make_tasks(a.cu_seqlens, Cut::queries, kQueryBlock))
    if (t.keys.size() > max_single) by_queries.push_back(t);
  int64_t longest = 0;
  for (const Task& t : single) longest = std::max(longest, t.keys.size());
  pass(kDq | kDkDv, std::move(single), longest);
  pass(kDkDv, std::move(by_keys), kTaskKeys);
  pass(kDq, std::move(by_queries), 0);
}

void attention_mass(const AttentionMassArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const Call c(cpu, attention_layout(a.q, a.k, View(), a.qkv), a.cos, a.sin, a.scale);
  launch_tasks(cpu, c, make_tasks(a.cu_seqlens, Cut::keys, kTaskKeys),
               bytes_of([&](Workspace& w) { MassBuffers(c, w); }),
               [c, lse = a.lse.as<float>(), out = a.mass.as<float>()](
                   const Task& task, int64_t head, Workspace workspace, const HeadTask&) {
                 mass(c, MassBuffers(c, workspace), task, head, lse, out);
               });
}

}  // namespace p2r::cpu

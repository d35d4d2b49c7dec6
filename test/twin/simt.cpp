// The block scheduler: starts a fiber for every thread, picks which runs next, detects deadlocks,
// and unwinds all threads when a kernel breaks a rule.
#include "test/twin/simt.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>

#include "test/twin/block.h"

namespace simt {

__thread Thread* current = nullptr;
__thread Block* block = nullptr;

Options& options() {
  static Options shared;
  return shared;
}
Stats& stats() {
  static Stats shared;
  return shared;
}

namespace {

// Thrown in a fiber at its wait point when its launch is abandoned; not a std::exception, so that
// nothing but the fiber's entry catches it.
struct Abandoned {};

void back_to_scheduler(bool never_back = false) {
  Fiber& f = self();
  switch_to(f.context, block->scheduler, never_back);
  current = &f;
}

std::string ranges(const std::vector<int>& sorted) {
  std::string s;
  for (size_t i = 0, j; i < sorted.size(); i = j + 1) {
    for (j = i; j + 1 < sorted.size() && sorted[j + 1] == sorted[j] + 1;) ++j;
    s += " " + std::to_string(sorted[i]);
    if (j > i) s += "-" + std::to_string(sorted[j]);
    if (s.size() > 2000) return s + " ...";
  }
  return s;
}

std::string block_name() {
  return "block " + std::to_string(block->index.x) + "," + std::to_string(block->index.y) + "," +
         std::to_string(block->index.z);
}

std::string deadlock_report() {
  std::map<std::string, std::vector<int>> groups;
  for (auto& f : block->fibers) {
    std::string what = "exited";
    if (f->state != State::done) {
      what = f->waits_for;
      if (f->waits_for_id >= 0) what += " " + std::to_string(f->waits_for_id);
      what += " at " + text(f->at);
    }
    groups[what].push_back(f->linear);
  }
  std::string s = "simt: DEADLOCK in " + block_name();
  for (auto& [what, who] : groups)
    s += "\n  " + std::to_string(who.size()) + " threads " + what + ":" + ranges(who);
  for (auto& [address, m] : block->mbarriers)
    s += "\n  mbarrier " + std::to_string(address) + ": phase " + std::to_string(m.phase) +
         ", arrivals missing " + std::to_string(m.pending) + ", bytes missing " +
         std::to_string(m.bytes_due);
  return s;
}

void make_ready(Fiber* f) {
  if (f->state != State::fresh) f->state = State::ready;
  if (block->opt.order == Order::WarpPrio)
    f->warp->ready.push_back(f);
  else
    block->ready.push_back(f);
}

template <class Queue>
Fiber* take(Queue& queue, size_t i) {
  std::swap(queue[i], queue.back());
  Fiber* f = queue.back();
  queue.pop_back();
  return f;
}

Fiber* next_fiber() {
  Block& b = *block;
  if (b.opt.order == Order::WarpPrio) {
    Warp* first = nullptr;
    for (Warp& w : b.warps)
      if (!w.ready.empty() && (!first || w.priority > first->priority)) first = &w;
    if (!first) return nullptr;
    if (b.random() % 256 == 0) first->priority = b.random();
    return take(first->ready, b.random() % first->ready.size());
  }
  if (b.ready.empty()) return nullptr;
  if (b.opt.order == Order::Random) return take(b.ready, b.random() % b.ready.size());
  if (b.opt.order == Order::Lifo) return take(b.ready, b.ready.size() - 1);
  Fiber* f = b.ready.front();
  b.ready.pop_front();
  return f;
}

void run_thread() {
  entered();
  Block& b = *block;
  Fiber& f = self();
  watch::acquire(&b.start_tag);
  try {
    (*b.body)();
    Quiet quiet;
    finish_stores(f);
  } catch (const Abandoned&) {
  } catch (const std::exception& e) {
    if (b.error.empty()) b.error = e.what();
  }
  watch::release(&b.end_tag);
  {
    Quiet quiet;
    f.state = State::done;
    --b.live;
    f.warp->live &= ~(1u << f.lane);
    if (!b.aborting && b.error.empty()) thread_exits(f);
  }
  back_to_scheduler(true);
  std::abort();
}

// As many as the register file has for a kernel that uses setmaxnreg, of which a multiprocessor
// holds one block at a time.
int registers_at_launch(int threads) { return std::min(65536 / threads, 255) / 8 * 8; }

void start_block(dim3 grid, dim3 dim, uint3 index, size_t shared_bytes) {
  Block& b = *block;
  b.index = index;
  b.threads = b.live = int(dim.x * dim.y * dim.z);
  b.error.clear();
  b.aborting = false;
  b.rng = b.opt.seed * 0x9E3779B97F4A7C15ull ^
          (index.x * 0xD1B54A32D192ED03ull + index.y * 31 + index.z + 0x1234567);
  if (!b.rng) b.rng = 1;
  b.random();
  b.mbarriers.clear();
  b.loads.clear();
  b.ready.clear();
  b.free_registers = 0;
  b.wants_registers.clear();
  for (Barrier& barrier : b.barriers) barrier = Barrier{};
  reset_shared(shared_bytes);

  const size_t warps = (size_t(b.threads) + 31) / 32;
  b.warps = std::vector<Warp>(warps);
  while (b.identities.size() < 2 * warps) b.identities.push_back(watch::new_identity());
  for (size_t w = 0; w < warps; ++w) {
    b.warps[w].id = int(w);
    b.warps[w].priority = b.random();
    b.warps[w].registers_held = registers_at_launch(b.threads);
    b.warps[w].async_identity = b.identities[2 * w];
    b.warps[w].retired_identity = b.identities[2 * w + 1];
  }

#if SIMT_ASAN || SIMT_TSAN
  const size_t default_stack = 256 * 1024;
#else
  const size_t default_stack = 64 * 1024;
#endif
  const size_t stack = b.opt.stack_bytes ? b.opt.stack_bytes : default_stack;
  while (b.fibers.size() < size_t(b.threads)) {
    b.fibers.push_back(std::make_unique<Fiber>());
    give_stack(b.fibers.back()->context, stack);
  }
  for (int i = 0; i < b.threads; ++i) {
    Fiber& f = *b.fibers[size_t(i)];
    const Context context = f.context;
    f = Fiber{};
    f.context = context;
    f.thread_index = uint3{i % dim.x, i / dim.x % dim.y, i / (dim.x * dim.y)};
    f.block_index = index;
    f.block_dim = dim;
    f.grid_dim = grid;
    f.linear = i;
    f.lane = i % 32;
    f.warp = &b.warps[size_t(i) / 32];
    f.warp->live |= 1u << f.lane;
    prepare(f.context, run_thread);
  }
  for (int i = 0; i < b.threads; ++i) {
    const int which = b.opt.order == Order::Reverse ? b.threads - 1 - i : i;
    make_ready(b.fibers[size_t(which)].get());
  }
  watch::release(&b.start_tag);
  for (Warp& w : b.warps) {
    watch::As async(w.async_identity);
    watch::acquire(&b.start_tag);
  }
}

void resume(Fiber& f) {
  ++block->resumes;
  if (f.state == State::fresh) f.state = State::ready;
  current = &f;
  switch_to(block->scheduler, f.context);
  current = nullptr;
}

// Completes one load in flight: under Late the newest, the order least like the program's.
void land_some_load() {
  Block& b = *block;
  const size_t i = b.opt.async == Async::Random ? b.random() % b.loads.size() : b.loads.size() - 1;
  auto load = std::move(b.loads[i]);
  b.loads.erase(b.loads.begin() + long(i));
  land_load(*load);
}

void check_finished_block() {
  Block& b = *block;
  if (!b.loads.empty()) throw Error("simt: " + block_name() + " ends with a TMA load in flight");
  for (Warp& w : b.warps) {
    if (!w.wgmma_open.ops.empty() || !w.wgmma_groups.empty())
      throw Error("simt: " + block_name() + ", warp " + std::to_string(w.id) +
                  " ends with wgmma not waited for");
    const Warp& leader = b.warps[size_t(w.id) & ~size_t(3)];
    if (w.wgmma_history != leader.wgmma_history)
      throw Error("simt: " + block_name() + ": the warps of warpgroup " + std::to_string(w.id / 4) +
                  " issued different wgmmas");
    if (w.registers_held != leader.registers_held)
      throw Error("simt: " + block_name() + ": the warps of warpgroup " + std::to_string(w.id / 4) +
                  " end with different setmaxnreg");
  }
}

// Resumes every thread that has begun, so that it throws at its wait point and unwinds.
void abandon_block() {
  Block& b = *block;
  b.aborting = true;
  for (size_t i = 0; i < size_t(b.threads); ++i) {
    Fiber& f = *b.fibers[i];
    if (f.state == State::fresh) f.state = State::done;
    while (f.state != State::done) resume(f);
  }
}

void run_block(dim3 grid, dim3 dim, uint3 index, size_t shared_bytes) {
  start_block(grid, dim, index, shared_bytes);
  Block& b = *block;
  try {
    while (b.live) {
      if (!b.loads.empty() && b.opt.async == Async::Random && b.random() % 8 == 0) land_some_load();
      if (Fiber* f = next_fiber())
        resume(*f);
      else if (release_active_askers())
        continue;
      else if (!b.loads.empty())
        land_some_load();
      else
        throw Error(deadlock_report());
      if (!b.error.empty()) throw Error(b.error);
    }
    watch::acquire(&b.end_tag);
    check_finished_block();
  } catch (...) {
    abandon_block();
    watch::acquire(&b.end_tag);
    throw;
  }
}

}  // namespace

std::string text(Where at) {
  const char* slash = strrchr(at.file, '/');
  return std::string(slash ? slash + 1 : at.file) + ":" + std::to_string(at.line);
}

bool leaving() { return block->aborting && std::uncaught_exceptions() > 0; }

void fail(const std::string& message, Where at) {
  Quiet quiet;
  std::string s = "simt: " + message + " [" + text(at);
  if (current) s += ", thread " + std::to_string(current->linear);
  s += ", " + block_name() + "]";
  if (!current) throw Error(s);
  if (block->error.empty()) block->error = s;
  throw Abandoned{};
}

void wake(std::vector<Fiber*>& sleepers) {
  const Order order = block->opt.order;
  if (order == Order::Reverse || order == Order::Lifo)
    std::reverse(sleepers.begin(), sleepers.end());
  for (Fiber* f : sleepers) make_ready(f);
  sleepers.clear();
}

void wait_for(const char* what, int id, Where at) {
  if (leaving()) return;
  if (block->aborting) throw Abandoned{};
  Fiber& f = self();
  f.state = State::waiting;
  f.waits_for = what;
  f.waits_for_id = id;
  f.at = at;
  back_to_scheduler();
  if (block->aborting) throw Abandoned{};
}

Block::Block(const Options& o) : opt(o) {
  adopt_os_thread(scheduler);
  tma_identity = watch::new_identity();
}

Block::~Block() {
  for (auto& f : fibers) return_stack(f->context);
  if (arena) watch::allow(arena, arena_bytes);
  free(arena);
  free(seen);
  watch::drop_identity(tma_identity);
  for (void* id : identities) watch::drop_identity(id);
}

std::string launch_problem(dim3 grid, dim3 dim, size_t shared_bytes) {
  const uint64_t threads = uint64_t(dim.x) * dim.y * dim.z;
  if (threads < 1 || threads > 1024 || dim.z > 64)
    return "invalid configuration: a block of " + std::to_string(threads) + " threads";
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535)
    return "invalid configuration: a grid of " + std::to_string(grid.x) + " x " +
           std::to_string(grid.y) + " x " + std::to_string(grid.z) + " blocks";
  if (shared_bytes > options().shared_limit)
    return std::to_string(shared_bytes) + " bytes of dynamic shared memory, at most " +
           std::to_string(options().shared_limit);
  return "";
}

void run_grid(dim3 grid, dim3 dim, size_t shared_bytes, bool shared_opt_in,
              const std::function<void()>& body) {
  const Options opt = options();
  if (std::string problem = launch_problem(grid, dim, shared_bytes); !problem.empty())
    throw Error("simt: " + problem);
  const uint64_t total = uint64_t(grid.x) * grid.y * grid.z;
  const bool backwards = opt.order == Order::Reverse || opt.order == Order::Lifo;
  std::atomic<uint64_t> next{0};
  std::exception_ptr failure;
  std::mutex mutex;
  auto work = [&] {
    Quiet quiet;
    Block own(opt);
    own.body = &body;
    own.shared_opt_in = shared_opt_in;
    block = &own;
    try {
      for (uint64_t i; (i = next++) < total;) {
        const uint64_t j = backwards ? total - 1 - i : i;
        run_block(grid, dim,
                  uint3{unsigned(j % grid.x), unsigned(j / grid.x % grid.y),
                        unsigned(j / grid.x / grid.y)},
                  shared_bytes);
      }
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex);
      if (!failure) failure = std::current_exception();
      next = total;
    }
    block = nullptr;
    std::lock_guard<std::mutex> lock(mutex);
    stats().resumes += own.resumes;
    stats().collectives += own.collectives;
    stats().shared_high = std::max(stats().shared_high, own.high);
  };
  const uint64_t workers = std::min<uint64_t>(opt.threads, total);
  if (workers <= 1) {
    work();
  } else {
    std::vector<std::thread> pool;
    for (uint64_t i = 0; i < workers; ++i) pool.emplace_back(work);
    for (std::thread& t : pool) t.join();
  }
  stats().blocks += total;
  if (failure) std::rethrow_exception(failure);
}

}  // namespace simt

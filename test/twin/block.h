// The runtime's private state: fibers, warps, the block that is running on this OS thread.
#pragma once
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "test/twin/sanitizers.h"
#include "test/twin/simt.h"

#if SIMT_UCONTEXT || !defined(__x86_64__)
#define SIMT_USE_UCONTEXT 1
#include <ucontext.h>
#endif

namespace simt {

using watch::Quiet;
using watch::Tag;

// ---- fibers (fibers.cpp) ----
struct Context {
#if SIMT_USE_UCONTEXT
  ucontext_t machine;
#else
  void* stack_pointer = nullptr;
#endif
  char* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // ASan's
  void* identity = nullptr;    // TSan's
};
void adopt_os_thread(Context& c);  // describes the current stack, to switch back to
void give_stack(Context& c, size_t bytes);
void return_stack(Context& c);
void prepare(Context& c, void (*entry)());
void switch_to(Context& from, Context& to, bool never_back = false);
void entered();  // first thing on a fresh fiber

// ---- what threads have in flight ----
struct CpAsync {
  unsigned char* dst;
  const unsigned char* src;
  int bytes, valid;
  bool landed;
};

struct BulkStore {
  TensorMap map;
  int coord[5];
  uint32_t src;
  bool add;
  bool read = false, written = false;
  std::vector<unsigned char> data;
  Where at;
};

struct BulkLoad {
  TensorMap map;
  int coord[5];
  uint32_t dst, bar, bytes;
  Where at;
  Tag issued;
};

enum class State : uint8_t { fresh, ready, waiting, done };

struct Fiber : Thread {
  Context context;
  State state = State::fresh;
  const char* waits_for = "";
  int waits_for_id = -1;
  Where at{"", 0};
  uint32_t active = 0;
  std::vector<CpAsync> copies_open;
  std::deque<std::vector<CpAsync>> copy_groups;
  std::vector<BulkStore> stores_open;
  std::deque<std::vector<BulkStore>> store_groups;
};

// ---- warps ----
enum class Op : uint8_t {
  syncwarp,
  shfl,
  vote,
  match,
  reduce,
  ldmatrix,
  mma,
  wgmma,
  wgmma_fence,
  wgmma_commit,
  wgmma_wait,
  setmaxnreg
};
const char* name_of(Op op);

// Lanes of one mask that wait at one operation; the last to arrive computes for all.
struct Rendezvous {
  uint32_t mask = 0, arrived = 0;
  Op op{};
  void* argument[32];
  Fiber* fiber[32];
  Where at{"", 0};
};
using Exchange = void (*)(void** arguments, uint32_t mask);
void collective(Op op, uint32_t mask, void* argument, Exchange exchange, Where at);

// Registers of a wgmma, tracked to detect use without a fence or while it is in flight.
struct Registers {
  uint32_t* lane[32];
  int words;
  std::vector<uint32_t> expected;  // what the arrays hold unless written
  std::vector<float> value;        // accumulators only: the results so far
  uint64_t fence_epoch = 0;
  int in_flight = 0;
  size_t index(int l, int word) const { return size_t(l) * words + word; }
};
struct PendingWgmma {
  Wgmma op;
  Registers* d;
  Registers* a;  // null: from shared memory
  Where at;
  bool done = false;
};
struct WgmmaGroup {
  std::vector<PendingWgmma> ops;
  std::unique_ptr<Tag> finished = std::make_unique<Tag>();
};

struct Warp {
  int id = 0;
  uint32_t live = 0;
  uint64_t priority = 0;
  Rendezvous meeting[32];  // each waiting lane is in exactly one
  int meetings = 0;
  std::vector<Fiber*> ready, asking_active;
  unsigned sync_generation = 0;
  Tag sync_tag[2], async_done;

  std::vector<std::unique_ptr<Registers>> registers;
  WgmmaGroup wgmma_open;
  std::deque<WgmmaGroup> wgmma_groups;
  uint64_t wgmma_history = 0;  // must be equal in the four warps of a warpgroup
  uint64_t fence_epoch = 0;
  bool fenced = false;
  int registers_held = 0;  // by each thread, of the register file

  // TSan identities: what the async proxy of this warp may see, and which wgmmas have retired.
  void* async_identity = nullptr;
  void* retired_identity = nullptr;
  Tag to_async;
};

struct Barrier {
  int expected = 0, arrived = 0;
  std::vector<Fiber*> waiting;
  Where first{"", 0};
  bool whole_block = false;
  int count = 0, result_count = 0, voters = 0, result_voters = 0;
  unsigned generation = 0;
  Tag tag[2], async_tag[2];
};

struct MBarrier {
  int count = 0, pending = 0;
  long bytes_due = 0;
  unsigned phase = 0;
  bool seen = true;  // a wait has returned since the last phase completed
  std::vector<Fiber*> waiting;
  std::unique_ptr<Tag[]> tags = std::make_unique<Tag[]>(4);
  Tag* threads(unsigned parity) { return &tags[parity & 1]; }
  Tag* async(unsigned parity) { return &tags[2 + (parity & 1)]; }
};

// ---- the block ----
constexpr size_t arena_bytes = 320 * 1024;
constexpr uint32_t dynamic_base = 1024;  // so that 0 is no shared address
constexpr uint32_t red_zone = 256;
constexpr uint32_t granule = 16;  // the unit in which proxy visibility is tracked

struct Block {
  Context scheduler;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::deque<Fiber*> ready;
  int threads = 0, live = 0;
  uint3 index{};
  Barrier barriers[16];
  std::map<uint32_t, MBarrier> mbarriers;
  std::deque<std::unique_ptr<BulkLoad>> loads;

  unsigned char* arena = nullptr;
  unsigned char* seen = nullptr;  // the arena as last visible to the async proxy
  std::vector<uint32_t> seen_at;  // per granule: proxy fences issued by then
  uint32_t proxy_fences = 0;
  size_t top = 0, high = 0;
  size_t dynamic_bytes = 0, static_bytes = 0;
  bool shared_opt_in = false;
  int free_registers = 0;  // of each thread of a warp, that warps have given up
  std::vector<Fiber*> wants_registers;
  std::map<const void*, void*> arrays;

  const Options opt;
  const std::function<void()>* body = nullptr;
  std::string error;
  bool aborting = false;
  uint64_t rng = 1, resumes = 0, collectives = 0;
  void* tma_identity = nullptr;
  std::vector<void*> identities;
  Tag start_tag, end_tag;

  explicit Block(const Options& o);
  ~Block();
  uint64_t random() {
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return rng;
  }
  // Whether an asynchronous operation takes effect as soon as it is issued.
  bool at_once() {
    return opt.async == Async::Early || (opt.async == Async::Random && random() % 2);
  }
};
extern __thread Block* block;

inline size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }
inline Fiber& self() { return *static_cast<Fiber*>(current); }
std::string text(Where at);
void wake(std::vector<Fiber*>& sleepers);
void wait_for(const char* what, int id, Where at);
// True in destructors that run because the launch is being abandoned: they must not block or fail.
bool leaving();

void thread_exits(Fiber& f);                      // barriers.cpp
bool release_active_askers();                     // barriers.cpp
void land_load(BulkLoad& load);                   // async.cpp
void finish_stores(Fiber& f);                     // async.cpp
void complete_bytes(uint32_t bar, size_t bytes);  // barriers.cpp
void check_mbarrier(uint32_t bar, Where at);      // barriers.cpp
uint32_t swizzled(uint32_t address, Swizzle mode);
void reset_shared(size_t dynamic_bytes);                                     // shared.cpp
void async_wrote(uint32_t address, size_t bytes);                            // shared.cpp
void async_reads(uint32_t address, size_t bytes, const char* by, Where at);  // shared.cpp

}  // namespace simt

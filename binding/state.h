// State of one JavaScript environment (each worker thread has its own): class constructors, the
// thread-safe function by which devices call back, and the devices to close when it ends. Nothing
// is global.
#pragma once
#include <napi.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "binding/debug.h"
#include "ops/backend.h"
#include "ops/recording.h"

namespace p2r::binding {

// Part of the type tags of native handles: those of another version of the addon have another
// layout. FNV-1a.
constexpr uint64_t version_tag(const char* version) {
  uint64_t hash = 0xcbf29ce484222325;
  for (; *version; ++version) hash = (hash ^ static_cast<unsigned char>(*version)) * 0x100000001b3;
  return hash;
}
#define P2R_TEXT(x) #x
#define P2R_TEXT_OF(macro) P2R_TEXT(macro)
constexpr uint64_t kVersionTag = version_tag(P2R_TEXT_OF(P2R_VERSION));
#undef P2R_TEXT_OF
#undef P2R_TEXT

struct OpenDevice;
struct Storage;
using Registry = std::unordered_set<OpenDevice*>;

// An open device with the state that only the JavaScript side needs.
struct OpenDevice {
  explicit OpenDevice(std::shared_ptr<Registry> registry);
  ~OpenDevice();

  std::unique_ptr<Device> device;  // null once disposed
  size_t max_queued_bytes = SIZE_MAX;
  bool throw_when_full = false;
  std::vector<std::shared_ptr<Fault>>
      pending;                                 // of work that is not known to be done, oldest first
  std::vector<std::shared_ptr<Fault>> raised;  // for synchronize() to report, once each
  std::string lost;                            // why the device is unusable; empty: it is not

  // Waits or throws where results of `bytes` more than OpenOptions::max_queued_bytes would be
  // queued.
  void reserve(size_t bytes);
  // A result belongs to the work that is queued by now.
  void queue(const std::shared_ptr<Storage>& result);

  // Moves pending faults of finished work to `raised`, or drops them if they are clean; drops what
  // was reported.
  void settle();
  // Drains the queue and frees the device.
  void close();
  // Frees the device; work that has not begun is left out.
  void abandon();
  // Reports to V8 how much memory the device has reserved, in large steps: V8 may collect garbage
  // for some milliseconds at every report, while the work just queued runs. Memory that is released
  // and allocated again does not change what is reserved; tensors left to the garbage collector
  // make it grow in time.
  void account(Napi::BasicEnv env);

 private:
  struct Queued {
    uint64_t sequence;
    std::weak_ptr<Storage> storage;  // memory that was given back is used again by later work
    size_t bytes;
  };
  void forget_done();
  std::shared_ptr<Registry> registry_;
  int64_t reported_ = 0;
  std::vector<Queued> queued_;  // oldest first; some may be done
  size_t queued_bytes_ = 0, most_queued_ = 16;
};

// Several operations that are one to the caller: their errors and faults carry its name.
struct Composite {
  std::string name;
  std::shared_ptr<Fault> fault;
  OpenDevice* device = nullptr;
};

// A scope whose work can be withdrawn, with its fault on each device that was used in it.
struct AbortScope {
  std::shared_ptr<std::atomic<bool>> requested = std::make_shared<std::atomic<bool>>(false);
  std::vector<std::shared_ptr<Fault>> faults;
};

// Where the next CPU calls are recorded as cases for the kernel twin.
struct Recording {
  std::string path;  // a folder; empty: not recording
  double work = 0;   // calls of more are not recorded
  int64_t left = 0;  // calls still to record
  Bound bound;
  int64_t count = 0;  // recorded so far, for file names
};

class State {
 public:
  explicit State(Napi::Env env);
  static State& of(Napi::Env env) { return *env.GetInstanceData<State>(); }

  // Runs f on the JavaScript thread when all that is queued so far is done; keeps the process alive
  // until then.
  using OnDone = std::function<void(Napi::Env, const std::string& lost)>;
  void when_done(const std::shared_ptr<OpenDevice>& device, OnDone f);
  void close_all();

  Napi::FunctionReference error_class, device_class, tensor_class;
  std::shared_ptr<Registry> open = std::make_shared<Registry>();
  std::vector<Composite> composites;
  std::unordered_map<uint32_t, AbortScope> abort_scopes;
  AbortScope* abort = nullptr;  // of the calls that come
  Recording record;
  const Debug debug = debug_level();

 private:
  struct Done;
  static void call_js(Napi::Env env, Napi::Function, std::nullptr_t*, Done* done);
  using Channel = Napi::TypedThreadSafeFunction<std::nullptr_t, Done, call_js>;
  Napi::Env env_;
  Channel channel_;
  int waiting_ = 0;
  bool closed_ = false;
};

// The exception in flight as a JavaScript error, for catch (...). Methods of wrapped objects call
// it through guarded<>.
Napi::Error convert(Napi::Env env, const std::string& op);

// A P2RError of lib/errors.ts.
Napi::Error make_error(Napi::Env env, Code code, const std::string& op, const std::string& message);

}  // namespace p2r::binding

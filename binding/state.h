// What belongs to one JavaScript environment (a worker thread has its own): class constructors, the
// channel by which devices call back, and the devices to close when it ends. Nothing here is
// global.
#pragma once
#include <napi.h>

#include <functional>
#include <memory>
#include <string>
#include <unordered_set>
#include <vector>

#include "ops/backend.h"
#include "ops/recording.h"

namespace p2r::binding {

struct OpenDevice;
using Registry = std::unordered_set<OpenDevice*>;

// An opened device with what only the JavaScript side keeps about it.
struct OpenDevice {
  explicit OpenDevice(std::shared_ptr<Registry> registry);
  ~OpenDevice();

  std::unique_ptr<Device> device;               // null once disposed
  std::vector<std::shared_ptr<Fault>> pending;  // not yet known to be clean, oldest first
  std::vector<std::shared_ptr<Fault>> raised;   // for synchronize() to report, once each
  std::string lost;                             // why the device is gone for good

  // Sorts what the queue has finished into raised and forgotten.
  void settle();
  // Drains, stops and frees.
  void close();
  // Tells V8 how much memory the device has taken from the system, in large steps. V8 collects
  // garbage for some milliseconds when it is told of more, beside the work that was just queued. So
  // memory that is disposed and handed out again is not told of; tensors that are left to be
  // collected make the device take more, sooner or later.
  void account(Napi::BasicEnv env);

 private:
  std::shared_ptr<Registry> registry_;
  int64_t told_ = 0;
};

// Several operations that are one for their caller: errors and faults carry its name.
struct Composite {
  std::string name;
  std::shared_ptr<Fault> fault;
  OpenDevice* device = nullptr;
};

// Where the next calls on the CPU are written down as cases for the kernel twin.
struct Recording {
  std::string path;  // a folder; empty: not recording
  double work = 0;   // calls of more are not written
  int64_t left = 0;  // how many may still be written
  Bound bound;
  int64_t count = 0;  // of all that were, to name them
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
  Recording record;

 private:
  struct Done;
  static void call_js(Napi::Env env, Napi::Function, std::nullptr_t*, Done* done);
  using Channel = Napi::TypedThreadSafeFunction<std::nullptr_t, Done, call_js>;
  Napi::Env env_;
  Channel channel_;
  int waiting_ = 0;
  bool closed_ = false;
};

// Methods of wrapped objects, with C++ errors made JavaScript's: InstanceMethod<guarded<...>>.
Napi::Error convert(Napi::Env env, const std::string& op);  // the exception in flight

// A P2RError as the public surface describes it.
Napi::Error make_error(Napi::Env env, Code code, const std::string& op, const std::string& message);

}  // namespace p2r::binding

#include "binding/state.h"

#include <algorithm>

#include "binding/tensor.h"

namespace p2r::binding {

void OpenDevice::settle() {
  std::erase_if(raised, [](const std::shared_ptr<Fault>& fault) { return fault->reported; });
  if (!device) return;
  forget_done();
  const uint64_t done = device->completed();
  std::vector<std::shared_ptr<Fault>> later;
  for (std::shared_ptr<Fault>& fault : pending) {
    if (fault->sequence > done)
      later.push_back(std::move(fault));
    else if (fault->raised() && !fault->reported)
      raised.push_back(std::move(fault));
  }
  pending = std::move(later);
}

void OpenDevice::forget_done() {
  const uint64_t done = device->completed();
  std::erase_if(queued_, [&](const Queued& q) {
    const bool gone = q.sequence <= done || q.storage.expired();
    if (gone) queued_bytes_ -= q.bytes;
    return gone;
  });
  most_queued_ = std::max<size_t>(16, 2 * queued_.size());
}

void OpenDevice::reserve(size_t bytes) {
  const auto full = [&] {
    return !queued_.empty() && queued_bytes_ > max_queued_bytes - std::min(bytes, max_queued_bytes);
  };
  if (!full()) return;
  forget_done();
  for (; full(); forget_done()) {
    if (throw_when_full)
      throw Error(Code::memory, "results of " + std::to_string(queued_bytes_) +
                                    " bytes are queued; with " + std::to_string(bytes) +
                                    " more they would exceed maxQueuedBytes");
    device->wait(queued_.front().sequence);
  }
}

void OpenDevice::queue(const std::shared_ptr<Storage>& result) {
  if (queued_.size() >= most_queued_) forget_done();
  queued_.push_back({device->queued(), result, result->bytes});
  queued_bytes_ += result->bytes;
}

OpenDevice::OpenDevice(std::shared_ptr<Registry> registry) : registry_(std::move(registry)) {
  registry_->insert(this);
}

OpenDevice::~OpenDevice() {
  abandon();  // nobody holds a tensor of it
  registry_->erase(this);
}

void OpenDevice::close() {
  queued_.clear();
  queued_bytes_ = 0;
  device.reset();  // drains the queue, so that faults of its last work are raised
  for (std::shared_ptr<Fault>& fault : pending)
    if (fault->raised()) raised.push_back(std::move(fault));
  pending.clear();
}

void OpenDevice::abandon() {
  if (device) device->abandon();
  close();
}

void OpenDevice::account(Napi::BasicEnv env) {
  constexpr int64_t kStep = int64_t{128} << 20;
  const int64_t held = device ? static_cast<int64_t>(device->reserved()) : 0;
  const int64_t change = held - reported_;
  if (device && change < kStep && change > -kStep) return;
  if (change) Napi::MemoryManagement::AdjustExternalMemory(env, change);
  reported_ = held;
}

struct State::Done {
  std::function<void(Napi::Env, const std::string&)> f;
  std::string lost;
};

State::State(Napi::Env env)
    : env_(env),
      channel_(Channel::New(env, Napi::Function::New(env, [](const Napi::CallbackInfo&) {}),
                            "p2r-kernels", 0, 1, static_cast<std::nullptr_t*>(nullptr))) {
  channel_.Unref(env);
  env.AddCleanupHook([this] { close_all(); });
}

void State::call_js(Napi::Env env, Napi::Function, std::nullptr_t*, Done* done) {
  if (env == nullptr) return;  // the environment is ending; see when_done
  std::unique_ptr<Done> owned(done);
  State& state = State::of(env);
  if (--state.waiting_ == 0) state.channel_.Unref(env);
  Napi::HandleScope scope(env);
  try {
    owned->f(env, owned->lost);
  } catch (const Napi::Error&) {
    // A worker that is being terminated runs no more JavaScript.
  }
}

void State::when_done(const std::shared_ptr<OpenDevice>& device, OnDone f) {
  OnDone done = [device, f = std::move(f)](Napi::Env env, const std::string& lost) {
    if (!lost.empty()) device->lost = lost;
    f(env, lost);
  };
  // Made here: on the device's thread nobody could be told that there is no memory.
  auto made = std::make_shared<std::unique_ptr<Done>>();
  made->reset(new Done{std::move(done), ""});
  device->device->notify([channel = channel_, made](const std::string& lost) mutable {
    (*made)->lost = lost;
    // If the ending environment refuses the call, its JavaScript references leak on purpose: this
    // thread must not release them.
    channel.NonBlockingCall(made->release());
  });
  if (waiting_++ == 0) channel_.Ref(env_);
}

void State::close_all() {
  if (closed_) return;
  closed_ = true;
  for (OpenDevice* device : *open) device->abandon();
  channel_.Release();
}

Napi::Error convert(Napi::Env env, const std::string& op) {
  try {
    try {
      throw;
    } catch (const Napi::Error& e) {
      return e;
    } catch (const Error& e) {
      return make_error(env, e.code, op, e.what());
    } catch (const std::bad_alloc&) {
      throw;
    } catch (const std::exception& e) {
      return make_error(env, Code::native_, op, e.what());
    }
  } catch (const std::bad_alloc&) {  // of the call, or of the text of its error
    return make_error(env, Code::memory, op, "the host is out of memory");
  }
}

Napi::Error make_error(Napi::Env env, Code code, const std::string& op,
                       const std::string& message) {
  Napi::Object options = Napi::Object::New(env);
  if (!op.empty()) options.Set("op", op);
  const std::string text = op.empty() ? message : "[" + op + "] " + message;
  Napi::Object error = State::of(env).error_class.New(
      {Napi::String::New(env, to_string(code)), Napi::String::New(env, text), options});
  return Napi::Error(env, error);
}

}  // namespace p2r::binding

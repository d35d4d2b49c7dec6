// The addon's exports: devices, tensors, and one function for each line of ops.def.
#include <napi.h>

#include "binding/device.h"
#include "binding/op.h"
#include "binding/state.h"
#include "binding/tensor.h"
#include "ops/ceilings.h"

namespace p2r::binding {

#define OP(family, function, Args) Napi::Value function(Call&);
#include "ops/ops.def"
#undef OP

namespace {

// The one place where C++ exceptions of operations become JavaScript errors. Reading the arguments
// allocates, and is inside: node-addon-api itself catches nothing of that.
template <Napi::Value (*parse)(Call&)>
napi_value enter(napi_env env, napi_callback_info raw) {
  std::string op;
  try {
    try {
      const Napi::CallbackInfo info(env, raw);
      Call call(info, static_cast<const char*>(info.Data()), op);
      return parse(call);
    } catch (...) {
      throw convert(env, op);
    }
  } catch (const Napi::Error& e) {
    e.ThrowAsJavaScriptException();
    return nullptr;
  }
}

// Functions that are no operations.
template <auto f>
auto guarded(const Napi::CallbackInfo& info) {
  try {
    return f(info);
  } catch (...) {
    throw convert(info.Env(), "");
  }
}

Napi::Value open_device(const Napi::CallbackInfo& info) {
  return construct(State::of(info.Env()).device_class, {info[0], info[1]});
}

Napi::Value devices(const Napi::CallbackInfo& info) {
  Napi::Array out = Napi::Array::New(info.Env());
  uint32_t n = 0;
  out.Set(n++, describe(info.Env(), cpu_info()));
  for (const DeviceInfo& d : cuda_infos()) out.Set(n++, describe(info.Env(), d));
  return out;
}

Napi::Value cuda(const Napi::CallbackInfo& info) {
  const CudaStatus status = cuda_status();
  Napi::Object o = Napi::Object::New(info.Env());
  o.Set("built", status.built);
  o.Set("available", status.available);
  o.Set("reason", status.reason);
  return o;
}

// Until endComposite, calls carry the composite's name and share one fault.
void begin_composite(const Napi::CallbackInfo& info) {
  State::of(info.Env()).composites.push_back({info[0].ToString(), nullptr, nullptr});
}
void end_composite(const Napi::CallbackInfo& info) { State::of(info.Env()).composites.pop_back(); }

// A scope whose work can be withdrawn, by a number: opens one, has the calls that come belong to it
// (0: to none), withdraws its work, and forgets it.
Napi::Value open_abort(const Napi::CallbackInfo& info) {
  State& state = State::of(info.Env());
  uint32_t number = 1;
  while (state.abort_scopes.contains(number)) ++number;
  state.abort_scopes.try_emplace(number);
  return Napi::Number::New(info.Env(), number);
}
AbortScope* abort_scope(const Napi::CallbackInfo& info) {
  State& state = State::of(info.Env());
  const auto it = state.abort_scopes.find(info[0].ToNumber().Uint32Value());
  return it == state.abort_scopes.end() ? nullptr : &it->second;
}
void abort_by(const Napi::CallbackInfo& info) { State::of(info.Env()).abort = abort_scope(info); }
void abort_work(const Napi::CallbackInfo& info) {
  if (AbortScope* scope = abort_scope(info)) *scope->requested = true;
}
void close_abort(const Napi::CallbackInfo& info) {
  State& state = State::of(info.Env());
  if (state.abort == abort_scope(info)) state.abort = nullptr;
  state.abort_scopes.erase(info[0].ToNumber().Uint32Value());
}

// (folder, work, calls, absolute, relative, ofLargest): writes the next `calls` CPU calls of at
// most that much work into the folder as cases (ops/recording.h); '' ends recording.
void record(const Napi::CallbackInfo& info) {
  const auto number = [&](size_t i) {
    return info[i].IsNumber() ? info[i].As<Napi::Number>().DoubleValue() : 0.0;
  };
  Recording& r = State::of(info.Env()).record;
  r.path = info[0].ToString();
  r.work = number(1);
  r.left = static_cast<int64_t>(number(2));
  r.bound = {number(3), number(4), number(5)};
}

// (threads, bytes, rounds): blocks for some tens of milliseconds.
Napi::Value ceilings(const Napi::CallbackInfo& info) {
  const auto number = [&](size_t i) {
    return info[i].IsNumber() ? info[i].As<Napi::Number>().Int64Value() : int64_t{0};
  };
  try {
    const Ceilings c =
        measure_ceilings(static_cast<int>(number(0)), number(1), static_cast<int>(number(2)));
    Napi::Object o = Napi::Object::New(info.Env());
    o.Set("fma", c.fma);
    if (c.bf16 > 0) o.Set("bf16", c.bf16);
    o.Set("read", c.read);
    o.Set("copy", c.copy);
    o.Set("update", c.update);
    return o;
  } catch (...) {
    throw convert(info.Env(), "ceilings");
  }
}

}  // namespace

Napi::Object init(Napi::Env env, Napi::Object exports) {
  env.SetInstanceData(new State(env));
  State& state = State::of(env);
  state.device_class = Napi::Persistent(DeviceHandle::Init(env));
  state.tensor_class = Napi::Persistent(TensorHandle::Init(env));
  exports.Set("initialize", Napi::Function::New(env, [](const Napi::CallbackInfo& info) {
                State::of(info.Env()).error_class = Napi::Persistent(info[0].As<Napi::Function>());
              }));
  exports.Set("openDevice", Napi::Function::New(env, guarded<open_device>));
  exports.Set("devices", Napi::Function::New(env, guarded<devices>));
  exports.Set("cudaStatus", Napi::Function::New(env, guarded<cuda>));
  exports.Set("beginComposite", Napi::Function::New(env, guarded<begin_composite>));
  exports.Set("endComposite", Napi::Function::New(env, end_composite));
  exports.Set("openAbort", Napi::Function::New(env, guarded<open_abort>));
  exports.Set("abortBy", Napi::Function::New(env, abort_by));
  exports.Set("abort", Napi::Function::New(env, abort_work));
  exports.Set("closeAbort", Napi::Function::New(env, close_abort));
  exports.Set("ceilings", Napi::Function::New(env, ceilings));
  exports.Set("record", Napi::Function::New(env, record));
  Napi::Object ops = Napi::Object::New(env);
#define OP(family, function, Args)                                                    \
  {                                                                                   \
    napi_value made = nullptr;                                                        \
    napi_create_function(env, #function, NAPI_AUTO_LENGTH, enter<&binding::function>, \
                         const_cast<char*>(#function), &made);                        \
    ops.Set(#function, made);                                                         \
  }
#include "ops/ops.def"
#undef OP
  exports.Set("ops", ops);
  return exports;
}

NODE_API_MODULE(p2r_kernels, init)

}  // namespace p2r::binding

// The native object behind a Device of lib/device.ts.
#pragma once
#include <napi.h>

#include <memory>

#include "binding/state.h"

namespace p2r::binding {

class DeviceHandle : public Napi::ObjectWrap<DeviceHandle> {
 public:
  static Napi::Function Init(Napi::Env env);
  static DeviceHandle* From(const Napi::Value& value);
  explicit DeviceHandle(const Napi::CallbackInfo& info);  // (id, options)
  void Finalize(Napi::BasicEnv env) override;

  // Throws ERR_DISPOSED, or ERR_CUDA when the device is lost.
  std::shared_ptr<OpenDevice> open() const;

 private:
  template <Napi::Value (DeviceHandle::*method)(const Napi::CallbackInfo&)>
  Napi::Value guarded(const Napi::CallbackInfo& info) {
    try {
      return (this->*method)(info);
    } catch (...) {
      throw convert(info.Env(), static_cast<const char*>(info.Data()));
    }
  }
  Napi::Value Info(const Napi::CallbackInfo& info);
  Napi::Value Tensor(const Napi::CallbackInfo& info);      // (data, shape, dtype)
  Napi::Value Zeros(const Napi::CallbackInfo& info);       // (shape, dtype)
  Napi::Value OpenShared(const Napi::CallbackInfo& info);  // (name, bytes, offset, shape, dtype)
  Napi::Value Synchronize(const Napi::CallbackInfo& info);
  Napi::Value Time(const Napi::CallbackInfo& info);
  Napi::Value MemoryUse(const Napi::CallbackInfo& info);
  Napi::Value KernelNames(const Napi::CallbackInfo& info);  // (op)
  Napi::Value ResetPeak(const Napi::CallbackInfo& info);
  Napi::Value Dispose(const Napi::CallbackInfo& info);
  Napi::Value GetDisposed(const Napi::CallbackInfo& info);

  std::shared_ptr<OpenDevice> device_;
};

Napi::Object describe(Napi::Env env, const DeviceInfo& info);

// `new f(...)`, for wrapped objects. Throws std::bad_alloc also where there is no room for the
// object itself, which node-addon-api makes, and reports through JavaScript.
Napi::Object construct(const Napi::FunctionReference& f,
                       const std::initializer_list<napi_value>& arguments);

}  // namespace p2r::binding

// The native object behind a Tensor of lib/tensor.ts: a handle on shared storage.
#pragma once
#include <napi.h>

#include <memory>
#include <vector>

#include "binding/state.h"
#include "ops/tensor.h"

namespace p2r::binding {

// Memory shared by views. Freed with the last handle, although queued work may still use it:
// devices reuse memory in the order of their queue.
struct Storage {
  Storage(std::shared_ptr<OpenDevice> device, size_t bytes);
  // Maps what another process shares under this name, from its first byte on.
  Storage(std::shared_ptr<OpenDevice> device, const std::string& name, size_t bytes, bool any_file);
  ~Storage();
  Storage(const Storage&) = delete;

  std::shared_ptr<OpenDevice> device;
  void* data = nullptr;
  size_t bytes = 0;
  bool mapped = false;  // not allocated by the device
  std::string shared;   // the name by which other processes open it; empty: none
  int shares = 0;       // calls of Share minus calls of Unshare
  std::vector<std::shared_ptr<Fault>> faults;  // faults that its contents may depend on
};

class TensorHandle : public Napi::ObjectWrap<TensorHandle> {
 public:
  static Napi::Function Init(Napi::Env env);
  static Napi::Object Make(Napi::Env env, std::shared_ptr<Storage> storage, DType dtype,
                           const Shape& shape, size_t offset = 0);
  // The handle behind a JavaScript value, or null if it is none.
  static TensorHandle* From(const Napi::Value& value);

  explicit TensorHandle(const Napi::CallbackInfo& info);
  void Finalize(Napi::BasicEnv env) override;

  View view(const char* what) const;  // throws Code::disposed
  const std::shared_ptr<Storage>& storage() const { return storage_; }
  void drop(Napi::BasicEnv env);

 private:
  template <Napi::Value (TensorHandle::*method)(const Napi::CallbackInfo&)>
  Napi::Value guarded(const Napi::CallbackInfo& info) {
    try {
      return (this->*method)(info);
    } catch (...) {
      throw convert(info.Env(), static_cast<const char*>(info.Data()));
    }
  }
  void adopt(Napi::Env env, std::shared_ptr<Storage> storage, DType dtype, const Shape& shape,
             size_t offset);
  Napi::Value Reshape(const Napi::CallbackInfo& info);
  Napi::Value Slice(const Napi::CallbackInfo& info);
  Napi::Value Read(const Napi::CallbackInfo& info);  // (ArrayBuffer): when filled
  // The values as f64 if they are there at once (1 ms at most): on the CPU, with an idle queue and
  // no raised fault; else undefined.
  Napi::Value Peek(const Napi::CallbackInfo& info);
  Napi::Value Write(const Napi::CallbackInfo& info);
  Napi::Value CopyFrom(const Napi::CallbackInfo& info);
  Napi::Value To(const Napi::CallbackInfo& info);
  Napi::Value Dispose(const Napi::CallbackInfo& info);
  Napi::Value Join(const Napi::CallbackInfo& info);
  Napi::Value Share(const Napi::CallbackInfo& info);  // (path): a promise of [name, offset, bytes]
  Napi::Value Unshare(const Napi::CallbackInfo& info);  // once for each call of Share
  Napi::Value GetShape(const Napi::CallbackInfo& info);
  Napi::Value GetDType(const Napi::CallbackInfo& info);
  Napi::Value GetDisposed(const Napi::CallbackInfo& info);

  void unshare();

  std::shared_ptr<Storage> storage_;
  DType dtype_ = DType::f32;
  Shape shape_;
  size_t offset_ = 0;
};

std::string to_string(const Shape& shape);  // '[2, 3]'
// Element i of a tensor in host memory.
double value_of(const View& v, int64_t i);

// Throws Code::memory for a shape that no tensor can have. Every shape of a new tensor goes through
// it.
void check_size(const Shape& shape);
// Reads a JavaScript array, whose getters may run any code: before native objects are looked up.
Shape parse_shape(const Napi::Value& value);
DType parse_dtype(const std::string& name);  // throws Code::dtype

// A typed array as the bytes of a tensor: f32 is rounded to f16 and bf16, all else is copied.
struct HostBytes {
  const void* data = nullptr;
  size_t bytes = 0;
  std::vector<uint16_t> converted;
};
HostBytes host_bytes(const Napi::Value& value, DType dtype, int64_t size);

// Throws if the device is lost, else the first raised fault, which is reported then.
void throw_faults(const std::vector<std::shared_ptr<Fault>>& faults, const std::string& lost,
                  Napi::Env env, const char* op);

}  // namespace p2r::binding

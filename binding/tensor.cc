#include "binding/tensor.h"

#include <algorithm>
#include <chrono>
#include <future>
#include <thread>

#include "binding/device.h"
#include "ops/half.h"

namespace p2r::binding {

namespace {

void* name(const char* method) { return const_cast<char*>(method); }

constexpr napi_type_tag kTag = {0x7032722d6b65726e, 0x656c732d74656e73 ^ kVersionTag};

}  // namespace

Storage::Storage(std::shared_ptr<OpenDevice> d, size_t n) : device(std::move(d)), bytes(n) {
  data = device->device->allocate(n);
}

Storage::Storage(std::shared_ptr<OpenDevice> d, const std::string& name, size_t n, bool any_file)
    : device(std::move(d)), bytes(n), mapped(true) {
  data = device->device->open_shared(name, n, any_file);
  device->device->adopt(n);
}

Storage::~Storage() {
  if (!device->device) return;
  if (!shared.empty()) device->device->unshare(shared);
  if (mapped) {
    device->device->disown(bytes);
    try {
      device->device->close_shared(data);
    } catch (...) {
      // Without memory to queue that with, it stays mapped until the device is closed.
    }
  } else {
    device->device->release(data);
  }
}

Napi::Function TensorHandle::Init(Napi::Env env) {
  return DefineClass(
      env, "TensorHandle",
      {InstanceMethod<&TensorHandle::guarded<&TensorHandle::Reshape>>("reshape", napi_default,
                                                                      name("reshape")),
       InstanceMethod<&TensorHandle::guarded<&TensorHandle::Slice>>("slice", napi_default,
                                                                    name("slice")),
       InstanceMethod<&TensorHandle::guarded<&TensorHandle::Read>>("read", napi_default,
                                                                   name("read")),
       InstanceMethod<&TensorHandle::guarded<&TensorHandle::Peek>>("peek", napi_default,
                                                                   name("peek")),
       InstanceMethod<&TensorHandle::guarded<&TensorHandle::Write>>("write", napi_default,
                                                                    name("write")),
       InstanceMethod<&TensorHandle::guarded<&TensorHandle::CopyFrom>>("copyFrom", napi_default,
                                                                       name("copyFrom")),
       InstanceMethod<&TensorHandle::guarded<&TensorHandle::To>>("to", napi_default, name("to")),
       InstanceMethod<&TensorHandle::guarded<&TensorHandle::Dispose>>("dispose", napi_default,
                                                                      name("dispose")),
       InstanceMethod<&TensorHandle::guarded<&TensorHandle::Join>>("join", napi_default,
                                                                   name("join")),
       InstanceMethod<&TensorHandle::guarded<&TensorHandle::Share>>("share", napi_default,
                                                                    name("ipcHandle")),
       InstanceMethod<&TensorHandle::guarded<&TensorHandle::Unshare>>("unshare", napi_default,
                                                                      name("ipcHandle")),
       InstanceAccessor<&TensorHandle::GetShape>("shape"),
       InstanceAccessor<&TensorHandle::GetDType>("dtype"),
       InstanceAccessor<&TensorHandle::GetDisposed>("disposed")});
}

TensorHandle::TensorHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<TensorHandle>(info) {
  napi_type_tag_object(info.Env(), info.This(), &kTag);
}

void TensorHandle::adopt(Napi::Env env, std::shared_ptr<Storage> storage, DType dtype,
                         const Shape& shape, size_t offset) {
  storage_ = std::move(storage);
  dtype_ = dtype;
  shape_ = shape;
  offset_ = offset;
  storage_->device->account(env);
}

Napi::Object TensorHandle::Make(Napi::Env env, std::shared_ptr<Storage> storage, DType dtype,
                                const Shape& shape, size_t offset) {
  Napi::Object object = construct(State::of(env).tensor_class, {});
  Unwrap(object)->adopt(env, std::move(storage), dtype, shape, offset);
  return object;
}

TensorHandle* TensorHandle::From(const Napi::Value& value) {
  if (!value.IsObject()) return nullptr;
  bool ours = false;
  if (napi_check_object_type_tag(value.Env(), value, &kTag, &ours) != napi_ok || !ours)
    return nullptr;
  return Unwrap(value.As<Napi::Object>());
}

void TensorHandle::drop(Napi::BasicEnv env) {
  if (!storage_) return;
  const std::shared_ptr<OpenDevice> device = storage_->device;
  storage_.reset();
  if (device.use_count() == 1) device->abandon();  // its handle was collected before
  device->account(env);
}

void TensorHandle::Finalize(Napi::BasicEnv env) { drop(env); }

View TensorHandle::view(const char* what) const {
  if (!storage_ || !storage_->device->device)
    throw Error(Code::disposed, std::string(what) + " was disposed");
  if (!storage_->device->lost.empty()) throw Error(Code::cuda, storage_->device->lost);
  View v;
  v.data = static_cast<char*>(storage_->data) + offset_;
  v.dtype = dtype_;
  v.shape = shape_;
  return v;
}

Napi::Value TensorHandle::Reshape(const Napi::CallbackInfo& info) {
  const Shape shape = parse_shape(info[0]);
  const View v = view("the tensor");
  if (shape.size() != v.size())
    throw Error(Code::shape, "a tensor of " + std::to_string(v.size()) +
                                 " elements cannot be reshaped to " + std::to_string(shape.size()));
  return Make(info.Env(), storage_, dtype_, shape, offset_);
}

Napi::Value TensorHandle::Slice(const Napi::CallbackInfo& info) {
  const View v = view("the tensor");
  if (v.shape.rank == 0) throw Error(Code::shape, "a scalar has no rows");
  if (!info[0].IsNumber() || !info[1].IsNumber())
    throw Error(Code::value, "start and end must be numbers of rows");
  const double start = info[0].ToNumber(), end = info[1].ToNumber();
  const double rows = static_cast<double>(v.shape[0]);
  if (!(start >= 0 && start <= end && end <= rows) || start != static_cast<int64_t>(start) ||
      end != static_cast<int64_t>(end))
    throw Error(Code::value, "rows " + info[0].ToString().Utf8Value() + " to " +
                                 info[1].ToString().Utf8Value() + " are out of range for " +
                                 std::to_string(v.shape[0]) + " rows");
  Shape shape = v.shape;
  shape.dim[0] = static_cast<int64_t>(end - start);
  const size_t row = v.shape[0] ? v.bytes() / v.shape[0] : 0;
  return Make(info.Env(), storage_, dtype_, shape, offset_ + static_cast<size_t>(start) * row);
}

void throw_faults(const std::vector<std::shared_ptr<Fault>>& faults, const std::string& lost,
                  Napi::Env env, const char* op) {
  if (!lost.empty()) throw make_error(env, Code::cuda, op, lost);
  for (const auto& f : faults)
    if (f->raised()) {
      f->reported = true;
      throw make_error(env, Code::value, f->op, f->text());
    }
}

Napi::Value TensorHandle::Read(const Napi::CallbackInfo& info) {
  const View v = view("the tensor");
  Napi::Env env = info.Env();
  std::shared_ptr<OpenDevice> device = storage_->device;
  // Made by JavaScript, where an allocation that fails is an exception; here it would end the
  // process.
  if (!info[0].IsArrayBuffer() || info[0].As<Napi::ArrayBuffer>().ByteLength() != v.bytes())
    throw Error(Code::value,
                "read fills an ArrayBuffer of " + std::to_string(v.bytes()) + " bytes");
  Napi::ArrayBuffer buffer = info[0].As<Napi::ArrayBuffer>();
  // Both may fail in a worker that is being terminated, so they come before the download: it may
  // start only once the buffer is referenced.
  auto deferred = std::make_shared<Napi::Promise::Deferred>(env);
  auto held = std::make_shared<Napi::Reference<Napi::ArrayBuffer>>(Napi::Persistent(buffer));
  device->device->download(buffer.Data(), v.data, v.bytes());
  try {
    State::of(env).when_done(device, [deferred, held, device, faults = storage_->faults](
                                         Napi::Env env, const std::string& lost) {
      try {
        throw_faults(faults, lost, env, "read");
        deferred->Resolve(env.Undefined());
      } catch (const Napi::Error& e) {
        deferred->Reject(e.Value());
      }
    });
  } catch (...) {
    device->device->wait(device->device->queued());  // nothing holds the buffer from here on
    throw;
  }
  return deferred->Promise();
}

Napi::Value TensorHandle::Peek(const Napi::CallbackInfo& info) {
  const View v = view("the tensor");
  const Device& device = *storage_->device->device;
  const auto raised = [](const std::shared_ptr<Fault>& f) { return f->raised(); };
  if (device.info().backend != "cpu") return info.Env().Undefined();
  // The task that resolves a wait may itself be counted as done only a moment after the wait.
  const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(1);
  while (device.completed() < device.queued() && std::chrono::steady_clock::now() < until)
    std::this_thread::yield();
  if (device.completed() < device.queued() ||
      std::any_of(storage_->faults.begin(), storage_->faults.end(), raised))
    return info.Env().Undefined();
  Napi::Float64Array out = Napi::Float64Array::New(info.Env(), static_cast<size_t>(v.size()));
  for (int64_t i = 0; i < v.size(); ++i) out[static_cast<size_t>(i)] = value_of(v, i);
  return out;
}

Napi::Value TensorHandle::Write(const Napi::CallbackInfo& info) {
  const View v = view("the tensor");
  const HostBytes source = host_bytes(info[0], v.dtype, v.size());
  storage_->device->device->upload(v.data, source.data, source.bytes);
  if (v.bytes() == storage_->bytes) storage_->faults.clear();
  return info.Env().Undefined();
}

Napi::Value TensorHandle::CopyFrom(const Napi::CallbackInfo& info) {
  const View v = view("the tensor");
  TensorHandle* other = From(info[0]);
  if (!other) throw Error(Code::value, "other must be a Tensor");
  const View source = other->view("the source");
  if (other->storage_->device != storage_->device)
    throw Error(Code::device, "the source is a tensor of another device; move it with to()");
  if (source.dtype != v.dtype)
    throw Error(Code::dtype, std::string("the source must be ") + p2r::to_string(v.dtype) +
                                 ", got " + p2r::to_string(source.dtype));
  if (!(source.shape == v.shape))
    throw Error(Code::shape, "the source must have the tensor's shape");
  if (source.data == v.data) return info.Env().Undefined();
  Device& device = *storage_->device->device;
  const char* a = v.as<char>();
  const char* b = source.as<char>();
  if (other->storage_ == storage_ && a < b + v.bytes() && b < a + v.bytes()) {
    const Scratch copy = device.scratch(v.bytes());
    device.copy(copy.as<char>(), source.data, v.bytes());
    device.copy(v.data, copy.as<char>(), v.bytes());
  } else {
    device.copy(v.data, source.data, v.bytes());
  }
  if (other->storage_ == storage_) return info.Env().Undefined();
  if (v.bytes() == storage_->bytes) storage_->faults.clear();
  std::vector<std::shared_ptr<Fault>>& faults = storage_->faults;
  for (const auto& f : other->storage_->faults)
    if (std::find(faults.begin(), faults.end(), f) == faults.end()) faults.push_back(f);
  return info.Env().Undefined();
}

Napi::Value TensorHandle::To(const Napi::CallbackInfo& info) {
  const View v = view("the tensor");
  DeviceHandle* handle = DeviceHandle::From(info[0]);
  if (!handle) throw Error(Code::value, "device must be a Device");
  std::shared_ptr<OpenDevice> target = handle->open();
  auto storage = std::make_shared<Storage>(target, v.bytes());
  storage->faults = storage_->faults;
  Device& source = *storage_->device->device;
  if (target == storage_->device) {
    source.copy(storage->data, v.data, v.bytes());
  } else {
    // Through host memory, ordered on both queues: the target's queue waits for the source's.
    auto bytes = std::make_shared<std::vector<char>>(v.bytes());
    auto downloaded = std::make_shared<std::promise<void>>();
    source.download(bytes->data(), v.data, v.bytes());
    source.notify([downloaded](const std::string&) { downloaded->set_value(); });
    target->device->upload_from(storage->data, v.bytes(),
                                [bytes, f = downloaded->get_future().share()]() -> const void* {
                                  f.wait();
                                  return bytes->data();
                                });
  }
  return Make(info.Env(), storage, dtype_, shape_);
}

Napi::Value TensorHandle::Dispose(const Napi::CallbackInfo& info) {
  drop(info.Env());
  return info.Env().Undefined();
}

// Makes a tensor that a composite returns depend on the composite's fault.
Napi::Value TensorHandle::Join(const Napi::CallbackInfo& info) {
  for (Composite& c : State::of(info.Env()).composites)
    if (c.fault && storage_) storage_->faults.push_back(c.fault);
  return info.Env().Undefined();
}

Napi::Value TensorHandle::Share(const Napi::CallbackInfo& info) {
  view("the tensor");
  const std::shared_ptr<Storage> storage = storage_;
  std::shared_ptr<OpenDevice> device = storage->device;
  if (storage->shared.empty()) {
    void* block = storage->data;
    storage->shared = device->device->share(block, storage->bytes, info[0].ToString());
    if (block != storage->data) {
      if (storage->mapped) {
        device->device->close_shared(storage->data);
        device->device->disown(storage->bytes);
      } else {
        device->device->release(storage->data);
      }
      device->device->adopt(storage->bytes);
      storage->data = block;
      storage->mapped = true;
    }
  }
  ++storage->shares;
  // The handle is delivered once everything queued so far is done: another process may read at
  // once.
  try {
    auto deferred = std::make_shared<Napi::Promise::Deferred>(info.Env());
    State::of(info.Env())
        .when_done(device, [deferred, device, name = storage->shared, offset = offset_,
                            bytes = storage->bytes,
                            faults = storage->faults](Napi::Env env, const std::string& lost) {
          try {
            throw_faults(faults, lost, env, "ipcHandle");
            Napi::Array out = Napi::Array::New(env, 3);
            out.Set(0u, name);
            out.Set(1u, static_cast<double>(offset));
            out.Set(2u, static_cast<double>(bytes));
            deferred->Resolve(out);
          } catch (const Napi::Error& e) {
            deferred->Reject(e.Value());
          }
        });
    return deferred->Promise();
  } catch (...) {
    unshare();
    throw;
  }
}

void TensorHandle::unshare() {
  if (!storage_ || --storage_->shares > 0) return;
  if (storage_->device->device) storage_->device->device->unshare(storage_->shared);
  storage_->shared.clear();
}

Napi::Value TensorHandle::Unshare(const Napi::CallbackInfo& info) {
  unshare();
  return info.Env().Undefined();
}

Napi::Value TensorHandle::GetShape(const Napi::CallbackInfo& info) {
  Napi::Array out = Napi::Array::New(info.Env(), shape_.rank);
  for (int i = 0; i < shape_.rank; ++i)
    out.Set(static_cast<uint32_t>(i), static_cast<double>(shape_.dim[i]));
  return out;
}
Napi::Value TensorHandle::GetDType(const Napi::CallbackInfo& info) {
  return Napi::String::New(info.Env(), p2r::to_string(dtype_));
}
Napi::Value TensorHandle::GetDisposed(const Napi::CallbackInfo& info) {
  return Napi::Boolean::New(info.Env(), !storage_ || !storage_->device->device);
}

std::string to_string(const Shape& shape) {
  std::string out = "[";
  for (int i = 0; i < shape.rank; ++i) out += (i ? ", " : "") + std::to_string(shape.dim[i]);
  return out + "]";
}

double value_of(const View& v, int64_t i) {
  switch (v.dtype) {
    case DType::f32:
      return v.as<float>()[i];
    case DType::f16:
      return f32_of_f16(v.as<uint16_t>()[i]);
    case DType::bf16:
      return f32_of_bf16(v.as<uint16_t>()[i]);
    case DType::i32:
      return v.as<int32_t>()[i];
    default:
      return v.as<uint8_t>()[i];
  }
}

DType parse_dtype(const std::string& name) {
  for (DType t : {DType::f32, DType::f16, DType::bf16, DType::i32, DType::u8})
    if (name == p2r::to_string(t)) return t;
  throw Error(Code::dtype, "dtype must be f32, f16, bf16, i32 or u8, got '" + name + "'");
}

void check_size(const Shape& shape) {
  if (!shape.is_representable())
    throw Error(Code::memory, "a tensor of shape " + to_string(shape) + " is too large");
}

Shape parse_shape(const Napi::Value& value) {
  if (!value.IsArray()) throw Error(Code::value, "a shape must be an array of sizes");
  const Napi::Array array = value.As<Napi::Array>();
  const uint32_t rank = array.Length();  // once: an element's getter may change it
  if (rank > kMaxRank)
    throw Error(Code::shape, "a shape has at most " + std::to_string(kMaxRank) + " axes, got " +
                                 std::to_string(rank));
  Shape shape;
  for (uint32_t i = 0; i < rank; ++i) {
    const Napi::Value v = array.Get(i);
    const double d = v.IsNumber() ? v.As<Napi::Number>().DoubleValue() : -1;
    if (!(d >= 0 && d <= 9007199254740991.0) || d != static_cast<double>(static_cast<int64_t>(d)))
      throw Error(Code::shape, "the sizes of a shape must be integers of at least 0");
    shape.dim[shape.rank++] = static_cast<int64_t>(d);
  }
  check_size(shape);
  return shape;
}

HostBytes host_bytes(const Napi::Value& value, DType dtype, int64_t size) {
  if (!value.IsTypedArray()) throw Error(Code::value, "host data must be a typed array");
  const Napi::TypedArray array = value.As<Napi::TypedArray>();
  if (static_cast<int64_t>(array.ElementLength()) != size)
    throw Error(Code::shape, "host data must have " + std::to_string(size) + " elements, got " +
                                 std::to_string(array.ElementLength()));
  HostBytes out;
  // array.ArrayBuffer() does not support SharedArrayBuffer.
  void* data = nullptr;
  napi_get_typedarray_info(value.Env(), value, nullptr, nullptr, &data, nullptr, nullptr);
  out.data = data;
  out.bytes = static_cast<size_t>(size) * size_of(dtype);
  const bool half = dtype == DType::f16 || dtype == DType::bf16;
  if (half && array.TypedArrayType() == napi_float32_array) {
    const float* x = static_cast<const float*>(static_cast<const void*>(out.data));
    out.converted.resize(size);
    for (int64_t i = 0; i < size; ++i)
      out.converted[i] = dtype == DType::f16 ? f16_of_f32(x[i]) : bf16_of_f32(x[i]);
    out.data = out.converted.data();
  } else if (array.ByteLength() != out.bytes) {
    throw Error(Code::dtype,
                std::string("host data must have the element type of ") + p2r::to_string(dtype));
  }
  return out;
}

}  // namespace p2r::binding

#include "binding/device.h"

#include "binding/tensor.h"
#include "ops/kernel_choice.h"

namespace p2r::binding {

namespace {

void* name(const char* method) { return const_cast<char*>(method); }

constexpr napi_type_tag kTag = {0x7032722d6b65726e, 0x656c732d64657669 ^ kVersionTag};

// 'cpu', 'cuda', 'cuda:1', or '' for the first CUDA device, else the CPU.
std::unique_ptr<Device> open_named(const std::string& id, const OpenOptions& options) {
  if (id == "cpu") return open_cpu(options);
  if (id.empty()) return cuda_status().available ? open_cuda(0) : open_cpu(options);
  const bool cuda = id.rfind("cuda", 0) == 0;
  const std::string index = cuda && id.size() > 5 && id[4] == ':' ? id.substr(5) : "";
  const bool digits = !index.empty() && index.size() < 4 &&
                      index.find_first_not_of("0123456789") == std::string::npos;
  if (!cuda || (id != "cuda" && !digits))
    throw Error(Code::device,
                "there is no device '" + id + "'; expected cpu, cuda or cuda:<index>");
  const CudaStatus status = cuda_status();
  if (!status.available)
    throw Error(Code::device, "'" + id + "' is not available: " + status.reason);
  const int n = digits ? std::stoi(index) : 0;
  const int count = static_cast<int>(cuda_infos().size());
  if (n >= count)
    throw Error(Code::device, "'" + id + "' does not exist: this machine has " +
                                  std::to_string(count) + " CUDA device" + (count == 1 ? "" : "s"));
  return open_cuda(n);
}

OpenOptions parse_options(const Napi::Value& value) {
  OpenOptions o;
  if (!value.IsObject()) return o;
  const Napi::Object object = value.As<Napi::Object>();
  if (const Napi::Value v = object.Get("threads"); !v.IsUndefined()) {
    const double n = v.IsNumber() ? v.As<Napi::Number>().DoubleValue() : 0;
    if (!(n >= 1 && n <= 1024) || n != static_cast<int>(n))
      throw Error(Code::value, "threads must be an integer from 1 to 1024");
    o.threads = static_cast<int>(n);
  }
  if (const Napi::Value v = object.Get("simd"); !v.IsUndefined()) {
    const std::string name = v.IsString() ? v.ToString().Utf8Value() : "";
    if (name != "avx512" && name != "avx2" && name != "neon" && name != "scalar")
      throw Error(Code::value, "simd must be avx512, avx2, neon or scalar");
    o.simd = name;
  }
  if (const Napi::Value v = object.Get("maxQueuedBytes"); !v.IsUndefined()) {
    o.max_queued_bytes = v.IsNumber() ? v.As<Napi::Number>().DoubleValue() : 0;
    if (!(o.max_queued_bytes >= 1 && o.max_queued_bytes <= 9007199254740991.0))
      throw Error(Code::value, "maxQueuedBytes must be a number from 1 to 2^53 - 1");
  }
  if (const Napi::Value v = object.Get("whenFull"); !v.IsUndefined()) {
    const std::string how = v.IsString() ? v.ToString().Utf8Value() : "";
    if (how != "wait" && how != "throw")
      throw Error(Code::value, "whenFull must be 'wait' or 'throw'");
    o.throw_when_full = how == "throw";
  }
  auto feature = [&](const char* name) {
    const Napi::Value v = object.Get(name);
    if (!v.IsUndefined() && !v.IsBoolean())
      throw Error(Code::value, std::string("features.") + name + " must be true or false");
    return v.IsUndefined() ? -1 : v.ToBoolean() ? 1 : 0;
  };
  o.bf16 = feature("bf16");
  o.vnni = feature("vnni");
  return o;
}

}  // namespace

Napi::Object describe(Napi::Env env, const DeviceInfo& info) {
  Napi::Object o = Napi::Object::New(env);
  o.Set("backend", info.backend);
  o.Set("id", info.id);
  o.Set("name", info.name);
  o.Set("memoryBytes", static_cast<double>(info.memory_bytes));
  if (info.threads) o.Set("threads", info.threads);
  if (!info.simd.empty()) {
    o.Set("simd", info.simd);
    Napi::Array features = Napi::Array::New(env, info.features.size());
    for (uint32_t i = 0; i < info.features.size(); ++i) features[i] = info.features[i];
    o.Set("features", features);
  }
  if (!info.capability.empty()) o.Set("computeCapability", info.capability);
  return o;
}

Napi::Function DeviceHandle::Init(Napi::Env env) {
  return DefineClass(env, "DeviceHandle",
                     {InstanceMethod<&DeviceHandle::guarded<&DeviceHandle::Info>>(
                          "info", napi_default, name("info")),
                      InstanceMethod<&DeviceHandle::guarded<&DeviceHandle::Tensor>>(
                          "tensor", napi_default, name("tensor")),
                      InstanceMethod<&DeviceHandle::guarded<&DeviceHandle::Zeros>>(
                          "zeros", napi_default, name("zeros")),
                      InstanceMethod<&DeviceHandle::guarded<&DeviceHandle::OpenShared>>(
                          "openShared", napi_default, name("fromIpcHandle")),
                      InstanceMethod<&DeviceHandle::guarded<&DeviceHandle::Synchronize>>(
                          "synchronize", napi_default, name("synchronize")),
                      InstanceMethod<&DeviceHandle::guarded<&DeviceHandle::Time>>(
                          "time", napi_default, name("time")),
                      InstanceMethod<&DeviceHandle::guarded<&DeviceHandle::MemoryUse>>(
                          "memory", napi_default, name("memory")),
                      InstanceMethod<&DeviceHandle::guarded<&DeviceHandle::KernelNames>>(
                          "kernels", napi_default, name("kernels")),
                      InstanceMethod<&DeviceHandle::guarded<&DeviceHandle::ResetPeak>>(
                          "resetPeak", napi_default, name("resetPeak")),
                      InstanceMethod<&DeviceHandle::guarded<&DeviceHandle::Dispose>>(
                          "dispose", napi_default, name("dispose")),
                      InstanceAccessor<&DeviceHandle::GetDisposed>("disposed")});
}

DeviceHandle::DeviceHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<DeviceHandle>(info) {
  napi_type_tag_object(info.Env(), info.This(), &kTag);
  try {
    device_ = std::make_shared<OpenDevice>(State::of(info.Env()).open);
    const OpenOptions options = parse_options(info[1]);
    device_->device = open_named(info[0].ToString(), options);
    const auto memory = static_cast<double>(device_->device->info().memory_bytes);
    device_->max_queued_bytes =
        static_cast<size_t>(options.max_queued_bytes ? options.max_queued_bytes : memory / 2);
    device_->throw_when_full = options.throw_when_full;
  } catch (...) {
    throw convert(info.Env(), "openDevice");
  }
}

Napi::Object construct(const Napi::FunctionReference& f,
                       const std::initializer_list<napi_value>& arguments) {
  try {
    return f.New(arguments);
  } catch (const Napi::Error& e) {
    if (e.Message() == std::bad_alloc().what()) throw std::bad_alloc();
    throw;
  }
}

void DeviceHandle::Finalize(Napi::BasicEnv env) {
  // Tensors may outlive the device's handle: the last of them closes the device.
  if (device_ && device_.use_count() == 1) {
    device_->abandon();
    device_->account(env);
  }
  device_.reset();
}

DeviceHandle* DeviceHandle::From(const Napi::Value& value) {
  if (!value.IsObject()) return nullptr;
  bool ours = false;
  if (napi_check_object_type_tag(value.Env(), value, &kTag, &ours) != napi_ok || !ours)
    return nullptr;
  return Unwrap(value.As<Napi::Object>());
}

std::shared_ptr<OpenDevice> DeviceHandle::open() const {
  if (!device_->device) throw Error(Code::disposed, "the device was disposed");
  if (!device_->lost.empty()) throw Error(Code::cuda, device_->lost);
  return device_;
}

Napi::Value DeviceHandle::Info(const Napi::CallbackInfo& info) {
  return describe(info.Env(), open()->device->info());
}

Napi::Value DeviceHandle::Tensor(const Napi::CallbackInfo& info) {
  const Shape shape = parse_shape(info[1]);
  const DType dtype = parse_dtype(info[2].ToString());
  const HostBytes source = host_bytes(info[0], dtype, shape.size());
  std::shared_ptr<OpenDevice> device = open();
  auto storage = std::make_shared<Storage>(device, source.bytes);
  device->device->upload(storage->data, source.data, source.bytes);
  return TensorHandle::Make(info.Env(), storage, dtype, shape);
}

Napi::Value DeviceHandle::Zeros(const Napi::CallbackInfo& info) {
  const Shape shape = parse_shape(info[0]);
  const DType dtype = parse_dtype(info[1].ToString());
  std::shared_ptr<OpenDevice> device = open();
  const size_t bytes = static_cast<size_t>(shape.size()) * size_of(dtype);
  auto storage = std::make_shared<Storage>(device, bytes);
  device->device->zero(storage->data, bytes);
  return TensorHandle::Make(info.Env(), storage, dtype, shape);
}

Napi::Value DeviceHandle::OpenShared(const Napi::CallbackInfo& info) {
  std::shared_ptr<OpenDevice> device = open();
  const double bytes = info[1].ToNumber(), offset = info[2].ToNumber();
  const Shape shape = parse_shape(info[3]);
  const DType dtype = parse_dtype(info[4].ToString());
  const double size = static_cast<double>(shape.size()) * static_cast<double>(size_of(dtype));
  if (!(bytes >= 0 && offset >= 0 && bytes <= 9007199254740991.0 && offset + size <= bytes) ||
      bytes != static_cast<double>(static_cast<int64_t>(bytes)) ||
      offset != static_cast<double>(static_cast<int64_t>(offset)) ||
      static_cast<int64_t>(offset) % static_cast<int64_t>(size_of(dtype)) != 0)
    throw Error(Code::value, "the tensor is not within the memory that its handle names");
  auto storage = std::make_shared<Storage>(device, info[0].ToString(), static_cast<size_t>(bytes),
                                           info[5].ToBoolean());
  return TensorHandle::Make(info.Env(), storage, dtype, shape, static_cast<size_t>(offset));
}

Napi::Value DeviceHandle::Synchronize(const Napi::CallbackInfo& info) {
  std::shared_ptr<OpenDevice> device = open();
  auto deferred = std::make_shared<Napi::Promise::Deferred>(info.Env());
  State::of(info.Env())
      .when_done(device, [deferred, device](Napi::Env env, const std::string& lost) {
        std::vector<std::shared_ptr<Fault>> first;
        device->settle();
        if (!device->raised.empty()) {
          first.push_back(device->raised.front());
          device->raised.erase(device->raised.begin());
        }
        try {
          throw_faults(first, lost, env, "synchronize");
          deferred->Resolve(env.Undefined());
        } catch (const Napi::Error& e) {
          deferred->Reject(e.Value());
        }
      });
  return deferred->Promise();
}

Napi::Value DeviceHandle::Time(const Napi::CallbackInfo& info) {
  std::shared_ptr<OpenDevice> device = open();
  if (!info[0].IsFunction()) throw Error(Code::value, "f must be a function");
  auto deferred = std::make_shared<Napi::Promise::Deferred>(info.Env());
  const std::shared_ptr<void> from = device->device->mark();
  info[0].As<Napi::Function>().Call({});
  if (!device->device) throw Error(Code::disposed, "the device was disposed");
  const std::shared_ptr<void> to = device->device->mark();
  State::of(info.Env())
      .when_done(device, [deferred, device, from, to](Napi::Env env, const std::string& lost) {
        if (!lost.empty())
          deferred->Reject(make_error(env, Code::cuda, "time", lost).Value());
        else if (!device->device)
          deferred->Reject(
              make_error(env, Code::disposed, "time", "the device was disposed").Value());
        else
          deferred->Resolve(Napi::Number::New(env, device->device->elapsed(from, to)));
      });
  return deferred->Promise();
}

Napi::Value DeviceHandle::MemoryUse(const Napi::CallbackInfo& info) {
  std::shared_ptr<OpenDevice> device = open();
  Napi::Object o = Napi::Object::New(info.Env());
  o.Set("liveBytes", static_cast<double>(device->device->live()));
  o.Set("peakBytes", static_cast<double>(device->device->peak()));
  o.Set("reservedBytes", static_cast<double>(device->device->reserved()));
  return o;
}

Napi::Value DeviceHandle::KernelNames(const Napi::CallbackInfo& info) {
  const std::string op = info[0].ToString();
  const std::vector<KernelChoice> choices = kernel_choices(op, open()->device->info());
  if (choices.empty()) throw Error(Code::value, "'" + op + "' has no choice of kernels");
  Napi::Array out = Napi::Array::New(info.Env(), choices.size());
  for (size_t i = 0; i < choices.size(); ++i) out.Set(static_cast<uint32_t>(i), choices[i].name);
  return out;
}

Napi::Value DeviceHandle::ResetPeak(const Napi::CallbackInfo& info) {
  open()->device->reset_peak();
  return info.Env().Undefined();
}

Napi::Value DeviceHandle::Dispose(const Napi::CallbackInfo& info) {
  device_->close();
  device_->account(info.Env());
  return info.Env().Undefined();
}

Napi::Value DeviceHandle::GetDisposed(const Napi::CallbackInfo& info) {
  return Napi::Boolean::New(info.Env(), !device_->device);
}

}  // namespace p2r::binding

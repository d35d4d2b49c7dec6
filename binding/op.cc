#include "binding/op.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "binding/device.h"

namespace p2r::binding {

namespace {

// snake_case of ops.def to the name under which lib/ exports the function.
std::string exported_name(const std::string& function) {
  std::string out;
  bool upper = false;
  for (char c : function) {
    if (c == '_')
      upper = true;
    else {
      out += upper ? static_cast<char>(std::toupper(c)) : c;
      upper = false;
    }
  }
  return out;
}

std::string describe_value(const Napi::Value& v) {
  if (v.IsUndefined()) return "undefined";
  if (v.IsNull()) return "null";
  if (v.IsNumber() || v.IsBoolean()) return v.ToString().Utf8Value();
  if (v.IsString()) return std::string("'").append(v.ToString()).append("'");
  if (v.IsArray()) return "an array";
  if (v.IsFunction()) return "a function";
  return "an object";
}

std::string one_of(DTypes dtypes) {
  std::string out;
  for (DType t : dtypes) out += std::string(out.empty() ? "" : " or ") + to_string(t);
  return out;
}

}  // namespace

std::string number_text(double x) {
  if (x == std::floor(x) && std::fabs(x) < 1e15) return std::to_string(static_cast<int64_t>(x));
  char text[32];
  std::snprintf(text, sizeof text, "%.9g", x);
  return text;
}

std::string quoted_list(const std::vector<const char*>& names) {
  std::string out;
  for (size_t i = 0; i < names.size(); ++i)
    out += std::string(i == 0 ? "'" : i + 1 < names.size() ? ", '" : " or '") + names[i] + "'";
  return out;
}

Call::Call(const Napi::CallbackInfo& info, const char* function, std::string& op)
    : info_(info), function_(function), op_(op) {
  op_ = exported_name(function);
  State& state = State::of(info.Env());
  if (!state.composites.empty()) op_ = state.composites.back().name;
}

void Call::name(const char* public_name) {
  if (State::of(env()).composites.empty()) op_ = public_name;
}

Call::~Call() {
  if (finished_) return;
  // The call threw while it queued its work.
  if (aborted_ && device_->device) device_->device->abort_by({});
  // The call threw: its fault cannot be raised, and its results have no other owner.
  if (fault_ && fault_->sequence == UINT64_MAX) fault_->sequence = 0;
  for (const Napi::Object& result : results_)
    if (TensorHandle* handle = TensorHandle::From(result)) handle->drop(env());
}

Napi::Value Call::next(const char* name) {
  if (at_ >= info_.Length()) throw Error(Code::value, std::string(name) + " is missing");
  return info_[at_++];
}

void Call::wrong(const char* name, const std::string& expected, const Napi::Value& got) {
  throw Error(Code::value,
              std::string(name) + " must be " + expected + ", got " + describe_value(got));
}

bool Call::given() {
  if (at_ < info_.Length() && !info_[at_].IsUndefined() && !info_[at_].IsNull()) return true;
  ++at_;
  return false;
}

std::string Call::Argument::label() const {
  return index < 0 ? name : std::string(name) + "[" + std::to_string(index) + "]";
}

void Call::check_open() const {
  check(device_ != nullptr, Code::value, "a tensor or a device is needed");
  check(device_->device != nullptr, Code::disposed, "the device was disposed");
}

void Call::check_overlap() const {
  if (std::none_of(arguments_.begin(), arguments_.end(),
                   [](const Argument& a) { return a.written; }))
    return;
  std::vector<const Argument*> sorted;
  for (const Argument& a : arguments_)
    if (a.view.size()) sorted.push_back(&a);
  const auto end = [](const Argument* a) { return a->view.element(a->view.size()); };
  std::stable_sort(sorted.begin(), sorted.end(), [](const Argument* a, const Argument* b) {
    return a->view.as<char>() < b->view.as<char>();
  });
  // Of the arguments before, those that reach furthest: of all, and of those that are written.
  const Argument *any = nullptr, *written = nullptr;
  for (const Argument* a : sorted) {
    const Argument* other = a->written ? any : written;
    if (other && a->view.as<char>() < end(other))
      throw Error(Code::value, a->label() + " must not share memory with " + other->label());
    if (!any || end(a) > end(any)) any = a;
    if (a->written && (!written || end(a) > end(written))) written = a;
  }
}

View Call::tensor(const char* name, int index, const Napi::Value& value, DTypes dtypes, int rank,
                  bool written) {
  TensorHandle* handle = TensorHandle::From(value);
  if (!handle) wrong(name, "a Tensor", value);
  const View view = handle->view(name);
  const std::shared_ptr<OpenDevice>& device = handle->storage()->device;
  if (!device_) device_ = device;
  // Messages are built only on failure: a training step passes a hundred tensors.
  if (device != device_)
    throw Error(Code::device,
                std::string(name) + " is a tensor of another device; move it with to()");
  if (std::find(dtypes.begin(), dtypes.end(), view.dtype) == dtypes.end())
    throw Error(Code::dtype, std::string(name) + " must be " + one_of(dtypes) + ", got " +
                                 p2r::to_string(view.dtype));
  if (rank >= 0 && view.shape.rank != rank)
    throw Error(Code::shape, std::string(name) + " must have " + std::to_string(rank) +
                                 " axes, got " + to_string(view.shape));
  arguments_.push_back({name, index, view, written, handle->storage()});
  return view;
}

In Call::in(const char* name, DTypes dtypes, int rank) {
  return {tensor(name, -1, next(name), dtypes, rank, false)};
}
In Call::maybe_in(const char* name, DTypes dtypes, int rank) {
  return given() ? in(name, dtypes, rank) : In{};
}
InOut Call::inout(const char* name, DTypes dtypes, int rank) {
  return {tensor(name, -1, next(name), dtypes, rank, true)};
}
InOut Call::maybe_inout(const char* name, DTypes dtypes, int rank) {
  return given() ? inout(name, dtypes, rank) : InOut{};
}

// All elements before the first tensor is looked up: a getter may dispose tensors.
std::vector<Napi::Value> Call::elements(const char* name) {
  const Napi::Value value = next(name);
  if (!value.IsArray()) wrong(name, "an array of Tensors", value);
  const Napi::Array array = value.As<Napi::Array>();
  std::vector<Napi::Value> out(array.Length());
  for (uint32_t i = 0; i < out.size(); ++i) out[i] = array.Get(i);
  return out;
}

std::vector<In> Call::in_list(const char* name, DTypes dtypes, int rank) {
  std::vector<In> out;
  int index = 0;
  for (const Napi::Value& value : elements(name))
    out.push_back({tensor(name, index++, value, dtypes, rank, false)});
  return out;
}
std::vector<InOut> Call::inout_list(const char* name, DTypes dtypes, int rank) {
  std::vector<InOut> out;
  int index = 0;
  for (const Napi::Value& value : elements(name))
    out.push_back({tensor(name, index++, value, dtypes, rank, true)});
  return out;
}

void Call::on_device(const char* name) {
  const Napi::Value value = next(name);
  DeviceHandle* handle = DeviceHandle::From(value);
  if (!handle) wrong(name, "a Device", value);
  std::shared_ptr<OpenDevice> device = handle->open();
  check(!device_ || device == device_, Code::device, std::string(name) + " is another device");
  device_ = device;
}

double Call::number(const char* name, double low, double high) {
  const Napi::Value value = next(name);
  if (!value.IsNumber()) wrong(name, "a number", value);
  const double x = value.As<Napi::Number>().DoubleValue();
  if (!(x >= low && x <= high) || !std::isfinite(x)) {
    std::string range = "a finite number";
    if (std::isfinite(low) && std::isfinite(high))
      range = "from " + number_text(low) + " to " + number_text(high);
    else if (std::isfinite(low))
      range = "a finite number of at least " + number_text(low);
    wrong(name, range, value);
  }
  return x;
}

int64_t Call::integer(const char* name, int64_t low, int64_t high) {
  const Napi::Value value = next(name);
  if (!value.IsNumber()) wrong(name, "an integer", value);
  const double x = value.As<Napi::Number>().DoubleValue();
  if (!(x == std::floor(x)) || !(x >= static_cast<double>(low) && x <= static_cast<double>(high)))
    wrong(name, "an integer from " + std::to_string(low) + " to " + std::to_string(high), value);
  return static_cast<int64_t>(x);
}

bool Call::flag(const char* name) {
  const Napi::Value value = next(name);
  if (!value.IsBoolean()) wrong(name, "true or false", value);
  return value.As<Napi::Boolean>().Value();
}

std::string Call::text(const char* name) {
  const Napi::Value value = next(name);
  if (!value.IsString()) wrong(name, "a string", value);
  return value.As<Napi::String>().Utf8Value();
}

size_t Call::index_of(const char* name, const std::vector<const char*>& names) {
  const Napi::Value value = next(name);
  if (value.IsString()) {
    const std::string given = value.As<Napi::String>().Utf8Value();
    for (size_t i = 0; i < names.size(); ++i)
      if (given == names[i]) return i;
  }
  wrong(name, quoted_list(names), value);
}

std::vector<double> Call::numbers(const char* name) {
  const Napi::Value value = next(name);
  if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != napi_float64_array)
    wrong(name, "a list of numbers", value);
  const Napi::Float64Array array = value.As<Napi::Float64Array>();
  return {array.Data(), array.Data() + array.ElementLength()};
}

Ints Call::ints(const char* name, int64_t low, int64_t high) {
  const std::vector<double> values = numbers(name);
  Ints out(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    const double x = values[i];
    if (!(x == std::floor(x) && x >= static_cast<double>(low) && x <= static_cast<double>(high)))
      throw Error(Code::value, std::string(name) + "[" + std::to_string(i) +
                                   "] must be an integer from " + std::to_string(low) + " to " +
                                   std::to_string(high) + ", got " + number_text(x));
    out[i] = static_cast<int64_t>(x);
  }
  return out;
}

Ints Call::cu_seqlens(const char* name, int64_t total) {
  const Ints c = ints(name, 0, INT32_MAX);
  check(!c.empty() && c.front() == 0, Code::value, std::string(name) + " must start with 0");
  for (size_t i = 1; i < c.size(); ++i)
    if (c[i] < c[i - 1])  // check() would build a message for each entry
      throw Error(Code::value, std::string(name) + " must not decrease, but [" + std::to_string(i) +
                                   "] is " + std::to_string(c[i]) + " after " +
                                   std::to_string(c[i - 1]));
  check(total < 0 || c.back() == total, Code::value,
        std::string(name) + " must end with the number of tokens, " + std::to_string(total) +
            ", got " + std::to_string(c.back()));
  return c;
}

void Call::same_shape(const char* name, const View& view, const Shape& expected) const {
  check(view.shape == expected, Code::shape,
        std::string(name) + " must have shape " + to_string(expected) + ", got " +
            to_string(view.shape));
}
void Call::same_dtype(const char* name, const View& view, DType expected) const {
  check(view.dtype == expected, Code::dtype,
        std::string(name) + " must be " + p2r::to_string(expected) + ", got " +
            p2r::to_string(view.dtype));
}

Out Call::result(DType dtype, const Shape& shape) {
  check_open();
  check_size(shape);
  if (results_.empty()) check_overlap();  // before memory is allocated
  Out out;
  out.dtype = dtype;
  out.shape = shape;
  device_->reserve(out.bytes());
  auto storage = std::make_shared<Storage>(device_, out.bytes());
  out.data = storage->data;
  held_.push_back(storage);
  // What is thrown from here on finds the result in its place, to give it back.
  Napi::Object& result = results_.emplace_back();
  result = TensorHandle::Make(env(), std::move(storage), dtype, shape);
  return out;
}

void Call::begin() {
  check_open();
  if (results_.empty()) check_overlap();
  if (!device_->pending.empty()) device_->settle();
}

void Call::abort_by(AbortScope& scope) {
  for (const auto& fault : scope.faults)
    if (fault->queue == device_.get()) aborted_ = fault;
  if (!aborted_) {
    aborted_ = std::make_shared<Fault>();
    aborted_->op = "scopeAsync";
    aborted_->queue = device_.get();
    aborted_->parts.push_back({std::make_shared<uint64_t>(0), {Invalid::aborted}});
    scope.faults.push_back(aborted_);
  }
  device_->device->abort_by({scope.requested, aborted_->parts[0].word});
}

FaultFlag Call::fault_flag(const FaultSource& source) {
  State& state = State::of(env());
  Composite* composite = state.composites.empty() ? nullptr : &state.composites.back();
  fault_word_ = device_->device->new_fault_word();
  if (composite && composite->fault && composite->device == device_.get()) {
    fault_ = composite->fault;
    // settle() may have dropped it when the composite's first operations were done; this one can
    // still raise it.
    const auto contains = [&](const std::vector<std::shared_ptr<Fault>>& list) {
      return std::find(list.begin(), list.end(), fault_) != list.end();
    };
    if (!contains(device_->pending) && !contains(device_->raised))
      device_->pending.push_back(fault_);
  } else {
    fault_ = std::make_shared<Fault>();
    fault_->op = op_;
    fault_->queue = device_.get();
    fault_->sequence = UINT64_MAX;  // until the work is queued
    device_->pending.push_back(fault_);
    if (composite) {
      composite->fault = fault_;
      composite->device = device_.get();
    }
  }
  fault_->parts.push_back({fault_word_, source});
  return {fault_word_.get()};
}

Debug Call::debug() const { return State::of(env()).debug; }

std::shared_ptr<Trace> Call::trace_before(std::vector<Field> fields) {
  const std::string own = exported_name(function_);
  return std::make_shared<Trace>(own == op_ ? own : op_ + ": " + own, std::move(fields),
                                 *device_->device, debug());
}

bool Call::recording() const {
  const Recording& record = State::of(env()).record;
  // What can be left out may not compute what would be recorded.
  return !record.path.empty() && record.left > 0 && !State::of(env()).abort &&
         device_->device->info().backend == "cpu";
}

double Call::recording_limit() const { return State::of(env()).record.work; }

std::shared_ptr<Case> Call::record_before(std::vector<Field> fields) {
  Recording& record = State::of(env()).record;
  auto c = std::make_shared<Case>();
  c->function = function_;
  c->bound = record.bound;
  c->fields = std::move(fields);
  --record.left;
  device_->device->host([c] {
    for (Field& f : c->fields)
      if (f.view && f.kind != Field::Kind::out)
        f.before.assign(f.view.as<char>(), f.view.as<char>() + f.view.bytes());
  });
  return c;
}

Napi::Value Call::finish(const std::shared_ptr<Case>& recorded) {
  State& state = State::of(env());
  if (recorded) {
    const std::string path =
        state.record.path + "/" + std::to_string(state.record.count++) + "-" + function_ + ".case";
    device_->device->host([recorded, path, word = fault_word_] {
      for (Field& f : recorded->fields)
        if (f.view && f.kind != Field::Kind::in)
          f.after.assign(f.view.as<char>(), f.view.as<char>() + f.view.bytes());
      if (word) recorded->fault = *word;
      write_case(path, *recorded);
    });
  }
  if (fault_) fault_->sequence = device_->device->queued();

  // Results depend on every fault that an argument depends on, and on this call's own.
  std::vector<std::shared_ptr<Fault>> faults;
  const uint64_t done = device_->device->completed();
  auto include = [&](const std::shared_ptr<Fault>& f) {
    const bool clean = f->queue == device_.get() && f->sequence <= done && !f->raised();
    if (!clean && std::find(faults.begin(), faults.end(), f) == faults.end()) faults.push_back(f);
  };
  for (const Argument& a : arguments_)
    for (const auto& f : a.storage->faults) include(f);
  if (fault_) include(fault_);
  if (aborted_) {
    aborted_->sequence = device_->device->queued();
    include(aborted_);
  }
  for (const Argument& a : arguments_)
    if (a.written) a.storage->faults = faults;
  for (const auto& storage : held_) {
    storage->faults = faults;
    device_->queue(storage);
  }
  finished_ = true;

  if (results_.empty()) return env().Undefined();
  if (results_.size() == 1) return results_[0];
  Napi::Array array = Napi::Array::New(env(), results_.size());
  for (size_t i = 0; i < results_.size(); ++i) array.Set(static_cast<uint32_t>(i), results_[i]);
  return array;
}

}  // namespace p2r::binding

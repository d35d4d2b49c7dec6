// One call of an operation: reads and checks its arguments in order, allocates its results and
// enqueues it on the device. binding/<family>.cc has one function for each line of ops.def:
//
//   Napi::Value gelu(Call& call) {
//     GeluArgs a;
//     a.x = call.in("x", kFloats);
//     a.tanh = call.flag("approximate");
//     a.out = call.result(a.x.dtype, a.x.shape);
//     return call.run(&Kernels::gelu, a);
//   }
//
// Every check comes before the first result, and the reads come in the order in which
// lib/ops/<family>.ts passes the arguments. Arguments with a member `fault` say by
// `fault_source()` what may be at fault.
#pragma once
#include <napi.h>

#include <memory>
#include <string>
#include <vector>

#include "binding/debug.h"
#include "binding/tensor.h"
#include "ops/backend.h"
#include "ops/enums.h"
#include "ops/recording.h"

namespace p2r::binding {

using DTypes = std::initializer_list<DType>;
inline constexpr DTypes kFloats = {DType::f32, DType::f16, DType::bf16};
inline constexpr DTypes kF32 = {DType::f32};
inline constexpr DTypes kI32 = {DType::i32};
inline constexpr DTypes kU8 = {DType::u8};
inline constexpr DTypes kAny = {DType::f32, DType::f16, DType::bf16, DType::i32, DType::u8};

// 'a', 'b' or 'c'.
std::string quoted_list(const std::vector<const char*>& names);

// A whole number without decimals.
std::string number_text(double x);

class Call {
 public:
  // op becomes the public name, which errors carry.
  Call(const Napi::CallbackInfo& info, const char* function, std::string& op);
  Call(const Call&) = delete;
  ~Call();

  const std::string& op() const { return op_; }
  // The public name, where it is not the function's own; a composite's name stays.
  void name(const char* public_name);
  Napi::Env env() const { return info_.Env(); }
  // The device of the tensors read so far.
  const Device& device() const {
    check_open();
    return *device_->device;
  }

  // Whether the next argument is given (neither undefined nor null); skips it if not.
  bool given();

  // Tensors of one of `dtypes`; rank -1: any. All of one call must live on one device.
  In in(const char* name, DTypes dtypes, int rank = -1);
  In maybe_in(const char* name, DTypes dtypes, int rank = -1);  // an empty view when not given
  InOut inout(const char* name, DTypes dtypes, int rank = -1);
  InOut maybe_inout(const char* name, DTypes dtypes, int rank = -1);
  std::vector<In> in_list(const char* name, DTypes dtypes, int rank = -1);
  std::vector<InOut> inout_list(const char* name, DTypes dtypes, int rank = -1);
  // The device itself, for operations without tensor arguments.
  void on_device(const char* name);

  // Host data. Numbers must be finite and within [low, high].
  double number(const char* name, double low, double high);
  int64_t integer(const char* name, int64_t low, int64_t high);
  bool flag(const char* name);
  std::string text(const char* name);
  // A value by its name in a table of ops/enums.h.
  template <class Enum, size_t n>
  Enum choice(const char* name, const Named<Enum> (&choices)[n]) {
    std::vector<const char*> names;
    for (const Named<Enum>& c : choices) names.push_back(c.name);
    return choices[index_of(name, names)].value;
  }
  // Which of `names` the next argument is.
  size_t index_of(const char* name, const std::vector<const char*>& names);
  Ints ints(const char* name, int64_t low, int64_t high);
  std::vector<double> numbers(const char* name);
  // 0 = c0 <= c1 <= ... <= cB = total; -1: of any total.
  Ints cu_seqlens(const char* name, int64_t total = -1);

  void check(bool ok, Code code, const std::string& message) const {
    if (!ok) throw Error(code, message);
  }
  void same_shape(const char* name, const View& view, const Shape& expected) const;
  void same_dtype(const char* name, const View& view, DType expected) const;

  // A new tensor on the call's device, returned in the order of these calls.
  Out result(DType dtype, const Shape& shape);

  // Enqueues the operation. Returns undefined, the only result, or an array of results.
  template <class Args>
  Napi::Value run(void (*Kernels::*function)(const Args&, Device&), Args& args) {
    begin();
    if constexpr (requires { args.fault; }) args.fault = fault_flag(args.fault_source());
    std::shared_ptr<Case> recorded;
    if (recording() && work_of(args) <= recording_limit()) recorded = record_before(collect(args));
    std::shared_ptr<Trace> trace;
    if (debug() != Debug::off) trace = trace_before(collect(args));
    AbortScope* scope = State::of(env()).abort;
    if (scope) abort_by(*scope);
    (device_->device->kernels().*function)(args, *device_->device);
    if (scope) device_->device->abort_by({});
    if (trace) Trace::finish(trace, *device_->device);
    return finish(recorded);
  }

 private:
  Napi::Value next(const char* name);
  [[noreturn]] void wrong(const char* name, const std::string& expected, const Napi::Value& got);
  std::vector<Napi::Value> elements(const char* name);
  View tensor(const char* name, int index, const Napi::Value& value, DTypes dtypes, int rank,
              bool written);
  // A getter of an argument that was read later may have disposed the device.
  void check_open() const;
  // What is written shares no memory with any other argument: threads read and write in any order.
  void check_overlap() const;
  void begin();
  // What is queued from now on can be withdrawn.
  void abort_by(AbortScope& scope);
  FaultFlag fault_flag(const FaultSource& source);
  Debug debug() const;
  std::shared_ptr<Trace> trace_before(std::vector<Field> fields);
  bool recording() const;
  double recording_limit() const;
  std::shared_ptr<Case> record_before(std::vector<Field> fields);
  Napi::Value finish(const std::shared_ptr<Case>& recorded);

  const Napi::CallbackInfo& info_;
  std::string function_;
  std::string& op_;
  size_t at_ = 0;
  bool finished_ = false;
  std::shared_ptr<OpenDevice> device_;
  struct Argument {
    const char* name;
    int index;  // in a list, else -1
    View view;
    bool written;
    std::shared_ptr<Storage> storage;

    std::string label() const;
  };
  std::vector<Argument> arguments_;
  std::vector<Napi::Object> results_;
  std::vector<std::shared_ptr<Storage>> held_;  // storage of the results, during the call
  std::shared_ptr<Fault> fault_;
  std::shared_ptr<uint64_t> fault_word_;  // this call's part of it
  std::shared_ptr<Fault> aborted_;        // that of the scope that can be aborted
};

}  // namespace p2r::binding

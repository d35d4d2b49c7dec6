// Recording of calls: the arguments of any operation as a list of plain fields (by Args::fields()),
// with the bytes of its tensors before and after, and their file format. The runner of the kernel
// twin (test/twin) rebuilds the arguments from it and runs the CUDA kernels' source on them.
#pragma once
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "ops/tensor.h"

namespace p2r {

struct Field {
  enum class Kind : uint8_t { in, out, inout, number, ints, numbers };
  Kind kind = Kind::number;
  View view;             // in, out, inout
  uint64_t address = 0;  // when recorded: equal addresses are one tensor
  double number = 0;     // number, flag or enum
  Ints ints;
  std::vector<double> numbers;
  std::vector<char> before, after;  // a tensor's bytes around the call
};

namespace detail {

template <class T>
Field::Kind kind_of(const T&) {
  if constexpr (std::is_same_v<T, In>) return Field::Kind::in;
  if constexpr (std::is_same_v<T, Out>) return Field::Kind::out;
  return Field::Kind::inout;
}
template <class T>
constexpr bool is_tensor = std::is_base_of_v<View, T>;

template <class T>
void collect_one(const T& value, std::vector<Field>& out) {
  Field f;
  if constexpr (is_tensor<T>) {
    f.kind = kind_of(value);
    f.view = value;
    f.address = reinterpret_cast<uint64_t>(value.data);
  } else if constexpr (std::is_same_v<T, Ints>) {
    f.kind = Field::Kind::ints;
    f.ints = value;
  } else if constexpr (std::is_same_v<T, std::vector<double>>) {
    f.kind = Field::Kind::numbers;
    f.numbers = value;
  } else if constexpr (requires { value.begin(); }) {  // a list of tensors: its length, then each
    f.number = static_cast<double>(value.size());
    out.push_back(f);
    for (const auto& v : value) collect_one(v, out);
    return;
  } else {
    f.number = static_cast<double>(value);
  }
  out.push_back(std::move(f));
}

template <class T>
void restore_one(T& value, const std::vector<Field>& in, size_t& at) {
  const Field& f = in.at(at++);
  if constexpr (is_tensor<T>) {
    static_cast<View&>(value) = f.view;
  } else if constexpr (std::is_same_v<T, Ints>) {
    value = f.ints;
  } else if constexpr (std::is_same_v<T, std::vector<double>>) {
    value = f.numbers;
  } else if constexpr (requires { value.begin(); }) {
    value.resize(static_cast<size_t>(f.number));
    for (auto& v : value) restore_one(v, in, at);
  } else if constexpr (std::is_enum_v<T>) {
    value = static_cast<T>(static_cast<int>(f.number));
  } else {
    value = static_cast<T>(f.number);
  }
}

}  // namespace detail

template <class Args>
std::vector<Field> collect(Args& args) {
  std::vector<Field> out;
  std::apply([&](auto&... each) { (detail::collect_one(each, out), ...); }, args.fields());
  return out;
}

template <class Args>
void restore(Args& args, const std::vector<Field>& fields) {
  size_t at = 0;
  std::apply([&](auto&... each) { (detail::restore_one(each, fields, at), ...); }, args.fields());
}

// A bound on the work of a call, in entries read or written and multiply-adds: every tensor once,
// plus Args::work() where there is one: a matrix product, or a block of threads to each short row.
template <class Args>
double work_of(Args& args) {
  double work = 0;
  for (const Field& f : collect(args))
    if (f.view) work += static_cast<double>(f.view.size());
  if constexpr (requires { args.work(); }) work += args.work();
  return work;
}

// How far a result may be from the expected entry e of a tensor whose largest entry is m:
// absolute + relative |e| + of_largest |m|.
struct Bound {
  double absolute = 0, relative = 0, of_largest = 0;
};

// A recorded call with its arguments and results, and its file (little-endian).
struct Case {
  std::string function;
  Bound bound;
  uint64_t fault = 0;  // its word (ops/fault.h)
  std::vector<Field> fields;
};
void write_case(const std::string& path, const Case& c);
Case read_case(const std::string& path);

}  // namespace p2r

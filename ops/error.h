#pragma once
#include <stdexcept>
#include <string>

namespace p2r {

enum class Code {
  shape,
  dtype,
  value,
  device,
  memory,
  cuda,
  disposed,
  native_,
  policy,
  format,
  io
};

struct Error : std::runtime_error {
  Code code;
  Error(Code c, const std::string& message) : std::runtime_error(message), code(c) {}
};

}  // namespace p2r

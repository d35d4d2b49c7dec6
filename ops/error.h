// Errors of every layer: a code from the closed list of the public surface and one sentence.
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

inline const char* to_string(Code code) {
  constexpr const char* names[] = {"ERR_SHAPE",  "ERR_DTYPE",  "ERR_VALUE",    "ERR_DEVICE",
                                   "ERR_MEMORY", "ERR_CUDA",   "ERR_DISPOSED", "ERR_NATIVE",
                                   "ERR_POLICY", "ERR_FORMAT", "ERR_IO"};
  return names[static_cast<int>(code)];
}

struct Error : std::runtime_error {
  Code code;
  Error(Code code, const std::string& message) : std::runtime_error(message), code(code) {}
};

}  // namespace p2r

// P2R_DEBUG: what a program's operations do, on stderr. '1': each operation with its tensors and
// its time on the device; 'nan': also the operations that make NaN or infinity of finite inputs,
// the first of which is where a training step went wrong. Nothing is done when the variable is
// unset, empty or '0'.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "ops/backend.h"
#include "ops/recording.h"

namespace p2r::binding {

enum class Debug { off, log, nan };
Debug debug_level();  // as the environment has it

// One call of an operation, from before it is queued.
class Trace {
 public:
  // Copies the inputs of float types if they are to be checked.
  Trace(std::string name, std::vector<Field> fields, Device& device, Debug level);
  // Once the call is queued: prints when the device is done with it.
  static void finish(const std::shared_ptr<Trace>& trace, Device& device);

 private:
  struct Tensor {
    View view;
    std::vector<char> bytes;  // host copy; empty: not checked
  };
  static void copy(std::vector<Tensor>& tensors, Device& device);
  void print(Device& device, const std::shared_ptr<void>& end, const std::string& error) const;

  std::string name_;
  bool check_values_;
  std::vector<Tensor> inputs_, outputs_;
  std::shared_ptr<void> start_;
};

}  // namespace p2r::binding

#include "binding/debug.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "binding/tensor.h"

namespace p2r::binding {

namespace {

std::string describe(const View& v) {
  return std::string(p2r::to_string(v.dtype)) + " " + to_string(v.shape);
}

// The first element that is NaN or infinite; -1: none.
int64_t first_not_finite(const View& v) {
  for (int64_t i = 0; i < v.size(); ++i)
    if (!std::isfinite(value_of(v, i))) return i;
  return -1;
}

}  // namespace

Debug debug_level() {
  const char* value = std::getenv("P2R_DEBUG");
  const std::string text = value ? value : "";
  if (text.empty() || text == "0") return Debug::off;
  return text == "nan" ? Debug::nan : Debug::log;
}

Trace::Trace(std::string name, std::vector<Field> fields, Device& device, Debug level)
    : name_(std::move(name)), check_values_(level == Debug::nan) {
  for (const Field& f : fields) {
    if (!f.view) continue;
    if (f.kind != Field::Kind::out) inputs_.push_back({f.view, {}});
    if (f.kind != Field::Kind::in) outputs_.push_back({f.view, {}});
  }
  if (check_values_) copy(inputs_, device);
  start_ = device.mark();
}

void Trace::copy(std::vector<Tensor>& tensors, Device& device) {
  for (Tensor& t : tensors) {
    if (t.view.dtype == DType::i32 || t.view.dtype == DType::u8 || !t.view.bytes()) continue;
    t.bytes.resize(t.view.bytes());
    device.download(t.bytes.data(), t.view.data, t.bytes.size());
  }
}

void Trace::finish(const std::shared_ptr<Trace>& trace, Device& device) {
  const std::shared_ptr<void> end = device.mark();
  if (trace->check_values_) copy(trace->outputs_, device);
  device.notify(
      [trace, end, &device](const std::string& error) { trace->print(device, end, error); });
}

void Trace::print(Device& device, const std::shared_ptr<void>& end,
                  const std::string& error) const {
  std::string line = "p2r-kernels: " + name_ + "(";
  for (size_t i = 0; i < inputs_.size(); ++i) line += (i ? ", " : "") + describe(inputs_[i].view);
  line += ")";
  for (size_t i = 0; i < outputs_.size(); ++i)
    line += (i ? ", " : " -> ") + describe(outputs_[i].view);
  try {
    if (!error.empty()) throw Error(Code::cuda, error);
    char time[48];
    std::snprintf(time, sizeof time, ", %.3f ms on ", device.elapsed(start_, end));
    line += time + device.info().id + "\n";
  } catch (const std::exception& e) {
    line += std::string(", failed: ") + e.what() + "\n";
  }
  const auto checked = [](const Tensor& t) {
    View v = t.view;
    v.data = const_cast<char*>(t.bytes.data());
    return v;
  };
  bool finite = error.empty();
  for (const Tensor& t : inputs_)
    if (!t.bytes.empty()) finite = finite && first_not_finite(checked(t)) < 0;
  for (size_t i = 0; finite && i < outputs_.size(); ++i) {
    if (outputs_[i].bytes.empty()) continue;
    const View v = checked(outputs_[i]);
    const int64_t at = first_not_finite(v);
    if (at < 0) continue;
    const double x = value_of(v, at);
    line += "p2r-kernels: " + name_ + " made " +
            (std::isnan(x) ? "NaN"
             : x > 0       ? "infinity"
                           : "-infinity") +
            " from finite inputs: output " + std::to_string(i) + ", " + describe(v) + ", element " +
            std::to_string(at) + "\n";
  }
  std::fputs(line.c_str(), stderr);  // one call, so that lines of several devices do not mix
}

}  // namespace p2r::binding

#include "ops/fault.h"

#include <cmath>
#include <cstdio>

#include "ops/half.h"

namespace p2r {

namespace {

std::string number_text(float x) {
  if (std::isnan(x)) return "NaN";
  if (std::isinf(x)) return x > 0 ? "infinity" : "-infinity";
  char text[32];
  std::snprintf(text, sizeof text, "%g", static_cast<double>(x));
  return text;
}

}  // namespace

std::string describe_fault(const FaultSource& source, uint64_t word) {
  const int64_t index = 0x7fffffff - static_cast<int64_t>(word >> 33);
  const uint32_t value = static_cast<uint32_t>(word);
  const auto entry = [&](const char* name) {
    const bool columns = source.what == Invalid::reward && source.extent > 1;
    const std::string at = columns ? std::to_string(index / source.extent) + ", " +
                                         std::to_string(index % source.extent)
                                   : std::to_string(index);
    return std::string(name) + "[" + at + "]";
  };
  const std::string integer = " = " + std::to_string(static_cast<int32_t>(value));
  const float real = f32_of_bits(value);
  if (word >> 32 & 1)
    return "mask[" + std::to_string(index) + "]" + integer + " is neither 0 nor 1";
  switch (source.what) {
    case Invalid::target:
      return entry("targets") + integer + " is not a token of " + std::to_string(source.extent) +
             ", nor -100";
    case Invalid::shard_target:
      return entry("targets") + integer + " is negative, and not -100";
    case Invalid::reward:
      if (const int64_t baseline = index - source.sequences * source.extent; baseline >= 0)
        return "baselines[" + std::to_string(baseline) + "] = " + number_text(real) +
               " is not finite";
      return entry("rewards") + " = " + number_text(real) + " is not finite";
    case Invalid::weight:
      return entry("weight") + " holds " + number_text(real) + ": nothing that can be quantised";
    case Invalid::aborted:
      return "its scope was aborted before this was computed";
    default:
      return entry("logits") + " holds " +
             (real < 0 ? "nothing but -infinity" : number_text(real)) + ": nothing can be drawn";
  }
}

}  // namespace p2r

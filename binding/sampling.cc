#include "ops/sampling.h"

#include <algorithm>

#include "binding/op.h"

namespace p2r::binding {

Napi::Value sample(Call& call) {
  SampleArgs a;
  a.logits = call.in("logits", kFloats, 2);
  a.temperature = call.number("temperature", 0, 1e30);
  a.seed = call.integer("seed", 0, (int64_t{1} << 53) - 1);
  const int64_t rows = a.logits.shape[0], vocabulary = a.logits.shape[1];
  call.check(rows == 0 || vocabulary > 0, Code::shape,
             "logits must have a vocabulary of at least 1, got " + to_string(a.logits.shape));
  call.check(rows <= INT32_MAX && vocabulary <= INT32_MAX, Code::shape,
             "logits must have fewer than 2^31 rows and columns, got " + to_string(a.logits.shape));
  a.out = call.result(DType::i32, {rows});
  return call.run(&Kernels::sample, a);
}

Napi::Value sample_tokens(Call& call) {
  SampleTokensArgs a;
  a.logits = call.in("logits", kFloats, 2);
  const int64_t rows = a.logits.shape[0], vocabulary = a.logits.shape[1];
  call.check(rows == 0 || vocabulary > 0, Code::shape,
             "logits must have a vocabulary of at least 1, got " + to_string(a.logits.shape));
  call.check(rows <= INT32_MAX && vocabulary <= INT32_MAX, Code::shape,
             "logits must have fewer than 2^31 rows and columns, got " + to_string(a.logits.shape));
  const auto one_a_row = [&](const char* name, size_t count) {
    call.check(static_cast<int64_t>(count) == rows, Code::value,
               std::string(name) + " must have one number for each of the " + std::to_string(rows) +
                   " rows, got " + std::to_string(count));
  };
  // Numbers within [low, high], without `low` itself where `above`.
  const auto settings = [&](const char* name, double low, double high, bool above = false) {
    std::vector<double> values = call.numbers(name);
    one_a_row(name, values.size());
    for (size_t i = 0; i < values.size(); ++i)
      if (!(values[i] >= low && values[i] <= high) || (above && values[i] == low))
        throw Error(Code::value, std::string(name) + "[" + std::to_string(i) + "] must be " +
                                     (above ? "above " : "from ") + number_text(low) + " to " +
                                     number_text(high) + ", got " + number_text(values[i]));
    return values;
  };
  a.seed = call.ints("seeds", 0, (int64_t{1} << 53) - 1);
  one_a_row("seeds", a.seed.size());
  a.temperature = settings("temperature", 0, 1e30);
  a.top_k = call.ints("topK", 0, INT32_MAX);
  one_a_row("topK", a.top_k.size());
  a.top_p = settings("topP", 0, 1);
  a.min_p = settings("minP", 0, 1);
  a.penalty = settings("repetitionPenalty", 0, 1e6, true);
  a.history_offsets = call.cu_seqlens("history offsets");
  one_a_row("history", a.history_offsets.size() - 1);
  const Ints all = call.ints("history", 0, vocabulary - 1);
  // Each token once.
  Ints offsets = {0};
  for (size_t r = 0; r + 1 < a.history_offsets.size(); ++r) {
    Ints own(all.begin() + a.history_offsets[r], all.begin() + a.history_offsets[r + 1]);
    std::sort(own.begin(), own.end());
    own.erase(std::unique(own.begin(), own.end()), own.end());
    // Without a penalty there is nothing to do for them.
    if (a.penalty[r] != 1) a.history.insert(a.history.end(), own.begin(), own.end());
    offsets.push_back(static_cast<int64_t>(a.history.size()));
  }
  a.history_offsets = offsets;
  a.tokens = call.result(DType::i32, {rows});
  a.log_probs = call.result(DType::f32, {rows});
  a.log_probs_filtered = call.result(DType::f32, {rows});
  return call.run(&Kernels::sample_tokens, a);
}

}  // namespace p2r::binding

// Weights of a linear layer in 8 or 4 bits, for inference: W [F, C] in groups of `group` (32 or 64)
// columns of a row, the last group shorter where C is no multiple, with one f16 scale each.
//
//   quantize    s[f, g] = f16(max |W[f, c in g]| / Q),  q[f, c] = clamp(round(W[f, c] / s), -Q, Q)
//   dequantize  Ŵ[f, c] = q[f, c] s[f, g]
//   linear      y[n, f] = Σ_g s[f, g] (Σ_{c in g} x[n, c] q[f, c]) + b[f]
//
// Q = 127 of 8 bits and 7 of 4, so that both ends are used alike: -8 would make steps an eighth
// smaller, but a weight whose opposite is as large would be wrong by a whole step; as it is, none
// is wrong by more than half of one. Divisions are f32, rounded to nearest even, as are f16 and the
// integers; where s is 0, q is 0. Hence
//
//   |Ŵ - W| <= s / 2 + Q 2^-25
//
// with the second term for scales below 2^-14, which f16 holds to 2^-25 only. Ŵ in f32 is exact. A
// group with NaN or infinity, or whose scale exceeds f16 (weights beyond 8.3e6, or 458624 of 4
// bits), faults: its scale is NaN, and q 0.
//
// W f32 | f16 | bf16; values u8 and scales f16, for panels of 16 features, the last one filled up
// with zeros, as are groups:
//
//   values  [ceil(F / 16), ceil(C / group), group bits / 8, 16]
//     8 bits: [group][16], a byte a weight, in two's complement
//     4 bits: [group / 8][16][4], a little-endian word of eight columns of a feature; the low half
//     has
//             the even columns 0, 2, 4, 6 from its lowest bits on, the high half the odd ones;
//             two's complement
//   scales  [ceil(F / 16), ceil(C / group), 16]
//
// quantized_linear: x, y, b as in ops/linear.h, with x and y in any float type; activations are not
// quantised. q is exact in bf16, and so is x q in f32; sums are f32 and y is rounded once, so that
// y errs from the layer of Ŵ only as far as the order of f32 sums goes. On the CPU one kernel
// serves any number of rows: groups are summed in order from 0, channel by channel or pair by pair
// (AVX512-BF16 and an x of bf16), scaled, and added in order to the bias: a row of y has the same
// bits alone and in any batch. On CUDA that holds for up to 16 rows; with more, Ŵ is rounded to x's
// type and multiplied as in ops/linear.h. There is no backward pass: gradients of Ŵ mean nothing
// for q.
//
// quantized_linear_log_probs: the forward pass of ops/linear_log_probs.h with such a weight and the
// logits of quantized_linear in f32, before they are rounded. On the CPU its results are the bits
// of token_log_probs of those, and the logits are never in memory; on CUDA up to 16 rows of them
// are, and with more rows Ŵ, rounded to hidden's type.
#pragma once
#include <tuple>

#include "ops/fault.h"
#include "ops/integer.h"
#include "ops/log_probs.h"
#include "ops/tensor.h"

namespace p2r {

constexpr int64_t kQuantizedPanel = 16;  // features

// How the weight is stored.
struct QuantizedLayout {
  int64_t features = 0, channels = 0;
  int bits = 8;
  int64_t group = 32;

  constexpr int64_t panels() const { return ceil_div(features, kQuantizedPanel); }
  constexpr int64_t groups() const { return ceil_div(channels, group); }
  constexpr int64_t group_bytes() const {
    return group * bits / 8 * kQuantizedPanel;
  }  // of a panel
  Shape values() const { return {panels(), groups(), group * bits / 8, kQuantizedPanel}; }
  Shape scales() const { return {panels(), groups(), kQuantizedPanel}; }
};

struct QuantizeArgs {
  In weight;
  int bits = 8;
  int64_t group = 32;
  Out values, scales;
  auto fields() { return std::tie(weight, bits, group, values, scales); }
  QuantizedLayout layout() const { return {weight.shape[0], weight.shape[1], bits, group}; }
  FaultFlag fault;
  FaultSource fault_source() const { return {Invalid::weight}; }
};

// out: f32 [F, C].
struct DequantizeArgs {
  In values, scales;
  int bits = 8;
  int64_t group = 32;
  Out out;
  auto fields() { return std::tie(values, scales, bits, group, out); }
  QuantizedLayout layout() const { return {out.shape[0], out.shape[1], bits, group}; }
};

struct QuantizedLinearLogProbsArgs {
  In hidden, values, scales, bias, targets;
  int bits = 8;
  int64_t group = 32, vocabulary = 0;
  double temperature = 1;
  Out log_probs, stats, entropy, squared_probs;  // one or both of the last two are absent
  auto fields() {
    return std::tie(hidden, values, scales, bias, targets, bits, group, vocabulary, temperature,
                    log_probs, stats, entropy, squared_probs);
  }
  double work() const { return 1.0 * hidden.size() * vocabulary; }
  QuantizedLayout layout() const { return {vocabulary, hidden.shape[1], bits, group}; }
  FaultFlag fault;
  FaultSource fault_source() const { return {Invalid::target, vocabulary}; }
};

struct QuantizedLinearArgs {
  In x, values, scales, bias;
  int bits = 8;
  int64_t group = 32;
  Out out;
  auto fields() { return std::tie(x, values, scales, bias, bits, group, out); }
  double work() const { return 1.0 * out.size() * x.shape[-1]; }
  QuantizedLayout layout() const { return {out.shape[-1], x.shape[-1], bits, group}; }
};

}  // namespace p2r

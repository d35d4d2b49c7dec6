// The gated activation of Llama's and Qwen's MLPs (SwiGLU; Shazeer, "GLU variants improve
// transformer", 2020), element by element.
//
//   out = silu(gate) up,   silu(x) = x σ(x),   σ(x) = 1 / (1 + e^-x)
//   dGate = dOut up σ(gate) (1 + gate (1 - σ(gate))),   dUp = dOut silu(gate)
//
// gate, up, out and their gradients: any shape, f32 | f16 | bf16, of one type; or packed: gate is
// [..., 2 F], up is absent, and each row holds F entries of gate and then F of up; dGate likewise,
// and dUp is absent. out, dOut are [..., F]. Computed in f32, rounded once. At a gate of -infinity
// silu is -0 and its derivative 0, their limits; NaN stays NaN.
#pragma once
#include <tuple>

#include "ops/tensor.h"

namespace p2r {

struct SwigluArgs {
  In gate, up;
  Out out;
  auto fields() { return std::tie(gate, up, out); }
};

struct SwigluBackwardArgs {
  In d_out, gate, up;
  Out d_gate, d_up;
  auto fields() { return std::tie(d_out, gate, up, d_gate, d_up); }
};

// Where an element of out has its gate and its up. Unpacked, all elements are one row.
struct GateUp {
  int64_t width, pitch;  // elements of a row of out, and of a row of gate
  int64_t up_at;         // elements from a gate to its up where they are packed

  GateUp(const View& up, const View& out)
      : width(up ? out.size() : out.shape[-1]),
        pitch(up ? width : 2 * width),
        up_at(up ? 0 : width) {}
  View up_of(const View& gate, const View& up) const {
    if (up) return up;
    View inside = gate;
    inside.data = gate.element(up_at);
    return inside;
  }
};

}  // namespace p2r

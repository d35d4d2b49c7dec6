// SwiGLU and its gradient, element by element, in chunks over threads.
#include "ops/swiglu.h"

#include <algorithm>

#include "cpu/device.h"

namespace p2r::cpu {

namespace {

// Elements of one task; 16-bit types are converted to f32 in blocks of kBlock within it.
constexpr int64_t kGrain = 16384, kBlock = 1024;

// f(i, at, n): elements i to i + n of out have their gates from element `at` on.
template <class F>
void for_blocks(const GateUp& rows, int64_t begin, int64_t end, int64_t block, const F& f) {
  for (int64_t i = begin; i < end;) {
    const int64_t column = i % rows.width;
    const int64_t n = std::min({block, end - i, rows.width - column});
    f(i, i / rows.width * rows.pitch + column, n);
    i += n;
  }
}

}  // namespace

void swiglu(const SwigluArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const GateUp rows(a.up, a.out);
  const View up = rows.up_of(a.gate, a.up);
  cpu.launch(a.out.size(), kGrain, [=, &simd = cpu.simd()](int64_t begin, int64_t end, int) {
    const DType dtype = a.out.dtype;
    if (dtype == DType::f32) {
      for_blocks(rows, begin, end, end, [&](int64_t i, int64_t at, int64_t n) {
        simd.swiglu(a.gate.as<const float>() + at, up.as<const float>() + at, a.out.as<float>() + i,
                    n);
      });
      return;
    }
    float gate[kBlock], other[kBlock];
    for_blocks(rows, begin, end, kBlock, [&](int64_t i, int64_t at, int64_t n) {
      simd.to_f32(dtype, a.gate.element(at), gate, n);
      simd.to_f32(dtype, up.element(at), other, n);
      simd.swiglu(gate, other, gate, n);
      simd.from_f32(dtype, gate, a.out.element(i), n);
    });
  });
}

void swiglu_backward(const SwigluBackwardArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const GateUp rows(a.up, a.d_out);
  const View up = rows.up_of(a.gate, a.up), d_up = rows.up_of(a.d_gate, a.d_up);
  cpu.launch(a.d_out.size(), kGrain, [=, &simd = cpu.simd()](int64_t begin, int64_t end, int) {
    const DType dtype = a.d_out.dtype;
    if (dtype == DType::f32) {
      for_blocks(rows, begin, end, end, [&](int64_t i, int64_t at, int64_t n) {
        simd.swiglu_backward(a.d_out.as<const float>() + i, a.gate.as<const float>() + at,
                             up.as<const float>() + at, a.d_gate.as<float>() + at,
                             d_up.as<float>() + at, n);
      });
      return;
    }
    float d[kBlock], gate[kBlock], other[kBlock];
    for_blocks(rows, begin, end, kBlock, [&](int64_t i, int64_t at, int64_t n) {
      simd.to_f32(dtype, a.d_out.element(i), d, n);
      simd.to_f32(dtype, a.gate.element(at), gate, n);
      simd.to_f32(dtype, up.element(at), other, n);
      simd.swiglu_backward(d, gate, other, gate, other, n);
      simd.from_f32(dtype, gate, a.d_gate.element(at), n);
      simd.from_f32(dtype, other, d_up.element(at), n);
    });
  });
}

}  // namespace p2r::cpu

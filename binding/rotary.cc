#include "ops/rotary.h"

#include "binding/grid.h"

namespace p2r::binding {

namespace {

int64_t read_head_dim(Call& call) {
  const int64_t head_dim = call.integer("headDim", 0, INT32_MAX);
  call.check(head_dim >= 8 && head_dim <= 128 && head_dim % 8 == 0, Code::value,
             "headDim must be a multiple of 8 from 8 to 128, got " + std::to_string(head_dim));
  return head_dim;
}

double read_theta(Call& call) {
  const double theta = call.number("theta", 0, HUGE_VAL);
  call.check(theta > 0, Code::value, "theta must be greater than 0, got 0");
  return theta;
}

}  // namespace

Napi::Value vision_rotary(Call& call) {
  VisionRotaryArgs a;
  call.on_device("device");
  a.grid_thw = call.ints("gridThw", 0, INT32_MAX);
  const int64_t head_dim = read_head_dim(call);
  a.theta = read_theta(call);
  a.merge = call.integer("mergeSize", 1, INT32_MAX);
  const int64_t tokens = tokens_of_grids(call, a.grid_thw, a.merge);
  a.cos = call.result(DType::f32, {tokens, head_dim});
  a.sin = call.result(DType::f32, {tokens, head_dim});
  return call.run(&Kernels::vision_rotary, a);
}

Napi::Value mrope_tables(Call& call) {
  MropeTablesArgs a;
  call.on_device("device");
  a.positions = call.ints("positions", 0, INT32_MAX);
  const int64_t head_dim = read_head_dim(call);
  a.theta = read_theta(call);
  int64_t tokens = static_cast<int64_t>(a.positions.size());
  if (call.given()) {
    a.sections = call.ints("sections", 0, head_dim);
    call.check(
        a.sections.size() == 3, Code::value,
        "sections must be 3 numbers of frequencies, got " + std::to_string(a.sections.size()));
    const int64_t all = a.sections[0] + a.sections[1] + a.sections[2];
    call.check(all == head_dim / 2, Code::value,
               "sections must add up to headDim / 2 = " + std::to_string(head_dim / 2) + ", got " +
                   std::to_string(all));
    call.check(tokens % 3 == 0, Code::value,
               "positions must be three for each token, got " + std::to_string(tokens));
    tokens /= 3;
  }
  a.cos = call.result(DType::f32, {tokens, head_dim});
  a.sin = call.result(DType::f32, {tokens, head_dim});
  return call.run(&Kernels::mrope_tables, a);
}

Napi::Value apply_rotary(Call& call) {
  ApplyRotaryArgs a;
  a.x = call.in("x", kFloats, 3);
  a.cos = call.in("cos", kF32, 2);
  a.sin = call.in("sin", kF32, 2);
  a.inverse = call.flag("inverse");
  const int64_t d = a.x.shape[2];
  call.check(d >= 8 && d <= 128 && d % 8 == 0, Code::shape,
             "x must have a head dimension that is a multiple of 8 from 8 to 128, got " +
                 to_string(a.x.shape));
  call.same_shape("cos", a.cos, {a.x.shape[0], d});
  call.same_shape("sin", a.sin, {a.x.shape[0], d});
  a.out = call.result(a.x.dtype, a.x.shape);
  return call.run(&Kernels::apply_rotary, a);
}

}  // namespace p2r::binding

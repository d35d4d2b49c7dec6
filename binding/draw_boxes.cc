#include "ops/draw_boxes.h"

#include "binding/boxes.h"

namespace p2r::binding {

namespace {
constexpr int64_t kMaxCoordinate = int64_t{1} << 31, kMaxWidth = 1 << 20;
}  // namespace

void read_boxes(Call& call, Ints* boxes, Ints* colors, int64_t* width) {
  *boxes = call.ints("boxes", -kMaxCoordinate, kMaxCoordinate);
  *colors = call.ints("colors", 0, 255);
  *width = call.given() ? call.integer("width", 0, kMaxWidth) : -1;
  call.check(boxes->size() % 4 == 0, Code::value, "boxes must be lists of 4 integers");
  call.check(colors->size() % 3 == 0 && (boxes->empty() || !colors->empty()), Code::value,
             "colors must be lists of 3 integers, at least one");
  // The backends expect sorted corners.
  for (size_t i = 0; i < boxes->size(); i += 4)
    for (size_t axis : {i, i + 1})
      if ((*boxes)[axis] > (*boxes)[axis + 2]) std::swap((*boxes)[axis], (*boxes)[axis + 2]);
}

void check_image(const Call& call, const char* name, const View& image) {
  call.check(image.shape[2] == 3, Code::shape,
             std::string(name) + " must be [height, width, 3], got " + to_string(image.shape));
  call.check(image.shape[0] < kMaxCoordinate && image.shape[1] < kMaxCoordinate, Code::shape,
             std::string(name) + " is too large: " + to_string(image.shape));
}

Napi::Value draw_boxes(Call& call) {
  DrawBoxesArgs a;
  a.image = call.in("image", kU8, 3);
  check_image(call, "image", a.image);
  read_boxes(call, &a.boxes, &a.colors, &a.width);
  a.out = call.result(DType::u8, a.image.shape);
  return call.run(&Kernels::draw_boxes, a);
}

}  // namespace p2r::binding

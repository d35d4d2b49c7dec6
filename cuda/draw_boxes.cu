// Boxes on an image: a thread copies one pixel, or stores the colour of the last stroke over it.
// Memory-bound.
#include "cuda/strokes.cuh"
#include "ops/draw_boxes.h"

namespace p2r::cuda {

namespace {

constexpr int kBlock = 256;

// A block takes kBlock consecutive pixels.
__global__ void __launch_bounds__(kBlock)
    draw_boxes_kernel(const uint8_t* image, uint8_t* out, int64_t pixels, int64_t width,
                      const Stroke* strokes, int32_t count) {
  SMEM_ARRAY(int32_t, range, 2);
  const int64_t begin = int64_t{blockIdx.x} * kBlock;
  strokes_in_rows(strokes, count, begin / width, (begin + kBlock - 1) / width + 1, range);
  const int64_t p = begin + threadIdx.x;
  if (p >= pixels) return;
  const uint8_t* color =
      pixel_color(image + p * 3, strokes, range[0], range[1], p / width, p % width);
  for (int c = 0; c < 3; ++c) out[p * 3 + c] = color[c];
}

}  // namespace

void draw_boxes(const DrawBoxesArgs& a, Device& device) {
  const int64_t height = a.image.shape[0], width = a.image.shape[1], pixels = height * width;
  if (!pixels) return;
  const std::vector<Stroke> strokes = strokes_of(a.boxes, a.colors, a.width, height, width);
  Scratch scratch = device.scratch(strokes.size() * sizeof(Stroke));
  if (!strokes.empty())
    device.upload(scratch.as<void>(), strokes.data(), strokes.size() * sizeof(Stroke));
  launch(draw_boxes_kernel, static_cast<unsigned>(ceil_div(pixels, kBlock)), kBlock, 0,
         stream_of(device), a.image.as<const uint8_t>(), a.out.as<uint8_t>(), pixels, width,
         scratch.as<const Stroke>(), static_cast<int32_t>(strokes.size()));
}

}  // namespace p2r::cuda

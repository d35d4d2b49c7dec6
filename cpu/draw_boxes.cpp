// Outlines of boxes: threads take bands of rows, copy them and fill the strokes that cross them.
#include "ops/draw_boxes.h"

#include <algorithm>
#include <cstring>

#include "cpu/device.h"

namespace p2r::cpu {

void draw_boxes(const DrawBoxesArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t height = a.image.shape[0], width = a.image.shape[1], pitch = width * 3;
  if (!pitch) return;
  const int64_t grain = std::max<int64_t>(1, (1 << 18) / pitch);
  cpu.launch(height, grain,
             [a, pitch, strokes = strokes_of(a.boxes, a.colors, a.width, height, width)](
                 int64_t begin, int64_t end, int) {
               uint8_t* out = a.out.as<uint8_t>();
               std::memcpy(out + begin * pitch, a.image.as<uint8_t>() + begin * pitch,
                           (end - begin) * pitch);
               for (const Stroke& s : strokes)
                 for (int64_t y = std::max<int64_t>(begin, s.y0); y < std::min<int64_t>(end, s.y1);
                      ++y)
                   for (int64_t x = s.x0; x < s.x1; ++x)
                     std::memcpy(out + y * pitch + x * 3, s.color, 3);
             });
}

}  // namespace p2r::cpu

#include "ops/kernel_choice.h"

namespace p2r {

namespace {

bool any(DType, int64_t) { return true; }
bool halves(DType dtype, int64_t) { return dtype != DType::f32; }

bool hopper(DType dtype, int64_t head_dim) {
  return dtype != DType::f32 &&
         (head_dim == 64 || head_dim == 72 || head_dim == 80 || head_dim == 128);
}

bool any_lengths(const Ints&) { return true; }

// Of the tiles of wgmma kernels, 128 tokens by 128 at least, a window of 64 tokens fills a quarter;
// those of mma kernels can be 64 by 64, on instructions that reach half of wgmma's rate and more.
// So wgmma has to multiply no more than twice as much.
bool fills_tiles_of_128(const Ints& cu_seqlens) {
  double by_128 = 0, by_64 = 0;
  for (size_t s = 1; s < cu_seqlens.size(); ++s) {
    const int64_t length = cu_seqlens[s] - cu_seqlens[s - 1];
    const auto tiles = [&](int64_t size) {
      return static_cast<double>((length + size - 1) / size);
    };
    by_128 += 4 * tiles(128) * tiles(128);
    by_64 += tiles(64) * tiles(64);
  }
  return by_128 <= 2 * by_64;
}

// In order of preference within each device.
constexpr KernelChoice kChoices[] = {
    {"attention", "cpu", "", "tiled", true, any, any_lengths},
    {"attention", "cuda", "9.0", "wgmma", false, hopper, fills_tiles_of_128},
    {"attention", "cuda", "", "mma", true, halves, any_lengths},
    {"attention", "cuda", "", "plain", true, any, any_lengths},
};

}  // namespace

std::vector<KernelChoice> kernel_choices(const std::string& op, const DeviceInfo& device) {
  std::vector<KernelChoice> found;
  for (const KernelChoice& c : kChoices)
    if (op == c.op && device.backend == c.backend &&
        (!*c.capability || device.capability == c.capability))
      found.push_back(c);
  return found;
}

}  // namespace p2r

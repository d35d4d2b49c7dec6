// libFuzzer's entry over the C++ that computes sizes and indices from what callers and files say:
// the plan of a resampling and its outlines, recorded cases, grids of patches. With clang:
//
//   clang++ -std=c++20 -I. -fsanitize=fuzzer,address,undefined test/native/fuzz.cpp ops/*.cpp
//
// Other compilers have no libFuzzer: P2R_FUZZ_MAIN adds a main() that mutates inputs of its own, N
// of them from a seed.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <new>
#include <random>
#include <string>

#include "ops/error.h"
#include "ops/grid.h"
#include "ops/recording.h"
#include "ops/resample_plan.h"

namespace p2r {
namespace {

// Not assert(): it must hold in every build.
void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

// Numbers from the input; zeros behind its end.
struct Bytes {
  const uint8_t* at;
  size_t left;
  uint64_t bits(int bytes) {
    uint64_t value = 0;
    for (int i = 0; i < bytes && left; i++, left--) value = value << 8 | *at++;
    return value;
  }
  // Uniform but for a tenth, which are the ends.
  int64_t within(int64_t low, int64_t high) {
    const uint64_t kind = bits(1);
    if (kind < 13) return low;
    if (kind < 26) return high;
    return low + static_cast<int64_t>(bits(4) % static_cast<uint64_t>(high - low + 1));
  }
};

void fuzz_axis(Bytes in) {
  const int64_t from = in.within(1, 70'000), to = in.within(1, 5'000);
  const Axis axis = resample_axis(from, to, static_cast<Filter>(in.within(0, 3)));
  require(axis.in == from && axis.out == to, "an axis of other sizes");
  require(axis.copy == (from == to), "a copy where sizes differ, or none where they are equal");
  if (axis.copy) return;
  require(axis.taps >= 1 && axis.taps <= from, "taps beyond the source");
  require(axis.stride >= axis.taps && axis.stride % 4 == 0, "rows of weights that are no quads");
  require(static_cast<int64_t>(axis.first.size()) == to, "a first pixel for each output");
  require(static_cast<int64_t>(axis.weights.size()) == to * axis.stride, "a row for each output");
  for (int64_t x = 0; x < to; x++) {
    const int64_t first = axis.first[x];
    require(first >= 0 && first + axis.taps <= from, "a tap outside of the source");
    int64_t sum = 0;
    for (int64_t t = 0; t < axis.stride; t++) {
      const int64_t weight = axis.weights[x * axis.stride + t];
      require(t < axis.taps || weight == 0, "a weight behind the taps");
      sum += weight;
    }
    // Each weight is rounded by itself.
    require(std::abs(sum - (int64_t{1} << kWeightBits)) <= axis.taps,
            "weights with another sum than 1");
  }
}

void fuzz_strokes(Bytes in) {
  const int64_t height = in.within(1, 4'000), width = in.within(1, 4'000);
  const int64_t far = int64_t{1} << 40;
  Ints boxes, colors;
  for (int64_t n = in.within(0, 5); n > 0; n--) {
    const int64_t x = in.within(-far, far), y = in.within(-far, far);
    boxes.insert(boxes.end(), {x, y, x + in.within(0, far), y + in.within(0, far)});
  }
  for (int64_t n = in.within(1, 3); n > 0; n--) colors.insert(colors.end(), {1, 2, 3});
  for (const Stroke& s : strokes_of(boxes, colors, in.within(-1, far), height, width))
    require(s.x0 >= 0 && s.y0 >= 0 && s.x0 < s.x1 && s.y0 < s.y1 && s.x1 <= width && s.y1 <= height,
            "a stroke outside of the image");
}

void fuzz_grids(Bytes in) {
  const int32_t merge = static_cast<int32_t>(in.within(1, 4));
  Ints grids;
  int64_t tokens = 0;
  for (int64_t n = in.within(0, 4); n > 0; n--) {
    const int64_t t = in.within(0, 3), h = merge * in.within(0, 6), w = merge * in.within(0, 6);
    grids.insert(grids.end(), {t, h, w});
    tokens += t * h * w;
  }
  const std::vector<PatchGrid> all = patch_grids(grids);
  std::vector<std::vector<bool>> seen(all.size());
  for (int64_t token = 0; token < tokens; token++) {
    const int g = grid_of(all.data(), static_cast<int>(all.size()), token);
    const PatchGrid& grid = all.at(g);
    const PatchPlace place = place_of(grid, token, merge);
    require(token >= grid.first, "a token before its grid");
    require(place.row >= 0 && place.row < grid.height, "a row outside of the grid");
    require(place.column >= 0 && place.column < grid.width, "a column outside of the grid");
    const int64_t frame = (token - grid.first) / grid.frame;
    const size_t at = (frame * grid.height + place.row) * grid.width + place.column;
    if (seen[g].size() <= at) seen[g].resize(at + 1);
    require(!seen[g][at], "two tokens at one place");
    seen[g][at] = true;
  }
}

void fuzz_case(Bytes in) {
  const std::string path = "/tmp/p2r-fuzz-" + std::to_string(getpid()) + ".case";
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(in.at), in.left);
  try {
    const Case c = read_case(path);
    // What can be read is written as it was.
    write_case(path, c);
    require(read_case(path).fields.size() == c.fields.size(), "another case when it is read again");
  } catch (const Error&) {
  }
  std::remove(path.c_str());
}

}  // namespace
}  // namespace p2r

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const p2r::Bytes in{data + 1, size - 1};
  switch (data[0] % 4) {
    case 0:
      p2r::fuzz_axis(in);
      break;
    case 1:
      p2r::fuzz_strokes(in);
      break;
    case 2:
      p2r::fuzz_grids(in);
      break;
    default:
      p2r::fuzz_case(in);
  }
  return 0;
}

#ifdef P2R_FUZZ_MAIN
namespace {

// A whole case as its own bytes, which the mutations start from.
std::vector<uint8_t> whole_case() {
  const std::string path = "/tmp/p2r-fuzz-whole-" + std::to_string(getpid()) + ".case";
  p2r::Case c{.function = "gelu"};
  c.fields.resize(3);
  c.fields[0].before = {1, 2, 3, 4};
  c.fields[1].ints = {1, 2};
  c.fields[2].numbers = {0.5};
  p2r::write_case(path, c);
  std::ifstream file(path, std::ios::binary);
  std::vector<uint8_t> bytes{3};
  bytes.insert(bytes.end(), std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  std::remove(path.c_str());
  return bytes;
}

}  // namespace

int main(int argc, char** argv) {
  const long count = argc > 1 ? std::atol(argv[1]) : 10'000;
  std::mt19937 random(argc > 2 ? std::atoi(argv[2]) : 1);
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % n); };
  const std::vector<uint8_t> whole = whole_case();
  for (long i = 0; i < count; i++) {
    std::vector<uint8_t> input;
    if (i % 4 == 3) {
      input = whole;
      for (size_t errors = below(4); errors > 0; errors--) {
        const size_t at = 1 + below(input.size() - 1);
        if (below(3) == 0)
          input.resize(at + 1);
        else
          input[at] = static_cast<uint8_t>(below(2) ? 255 : random());
      }
    } else {
      input.resize(1 + below(80));
      for (uint8_t& byte : input) byte = static_cast<uint8_t>(random());
      input[0] = static_cast<uint8_t>(i % 4);
    }
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("%ld inputs\n", count);
}
#endif

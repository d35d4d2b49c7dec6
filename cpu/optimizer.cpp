// Gradient clipping and AdamW over lists of tensors, which are cut into blocks for the threads.
#include "ops/optimizer.h"

#include <algorithm>

#include "cpu/device.h"

namespace p2r::cpu {

namespace {

// Up to kMaxSingleTaskElements all blocks are one task: waking other threads would take longer.
// 16-bit parameters are updated through f32 buffers of kBuffer elements.
constexpr int64_t kMaxSingleTaskElements = 32768, kBuffer = 512;

struct Block {
  int64_t tensor, first, n;
};

template <class Tensors>
std::vector<Block> split(const Tensors& tensors, int64_t* elements) {
  std::vector<Block> blocks;
  *elements = 0;
  for (size_t t = 0; t < tensors.size(); ++t) {
    const int64_t n = tensors[t].size();
    *elements += n;
    for (int64_t first = 0; first < n; first += kNormBlock)
      blocks.push_back({static_cast<int64_t>(t), first, std::min(kNormBlock, n - first)});
  }
  return blocks;
}

}  // namespace

void clip_grad_norm(const ClipGradNormArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  int64_t elements;
  std::vector<Block> blocks = split(a.grads, &elements);
  const int64_t count = static_cast<int64_t>(blocks.size());
  const Scratch scratch = cpu.scratch(blocks.size() * sizeof(double));
  cpu.submit([a, blocks = std::move(blocks), count, sums = scratch.as<double>(),
              grain = elements <= kMaxSingleTaskElements ? count : 1, &cpu] {
    const Simd& simd = cpu.simd();
    cpu.parallel(count, grain, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const Block& b = blocks[i];
        const View& g = a.grads[b.tensor];
        sums[i] = simd.sum_squares(g.dtype, g.element(b.first), b.n);
      }
    });
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += sums[i];
    const double norm = std::sqrt(sum);
    *a.norm.as<float>() = static_cast<float>(norm);
    const float factor = static_cast<float>(clip_factor(a.max_norm, norm));
    if (factor == 1) return;
    cpu.parallel(count, grain, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const Block& b = blocks[i];
        const View& g = a.grads[b.tensor];
        simd.scale(g.dtype, g.element(b.first), factor, b.n);
      }
    });
  });
}

void adam_w(const AdamWArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  int64_t elements;
  std::vector<Block> blocks = split(a.params, &elements);
  const int64_t count = static_cast<int64_t>(blocks.size());
  cpu.launch(count, elements <= kMaxSingleTaskElements ? count : 1,
             [a, k = adam_step(a), blocks = std::move(blocks), &simd = cpu.simd()](
                 int64_t begin, int64_t end, int) {
               for (int64_t i = begin; i < end; ++i) {
                 const Block& b = blocks[i];
                 const View &p = a.params[b.tensor], &g = a.grads[b.tensor];
                 float* m = a.moments[b.tensor].template as<float>() + b.first;
                 float* v = m + p.size();
                 const auto step = [&](float* values, const float* grads, int64_t offset,
                                       int64_t n) {
                   simd.adam_w(values, grads, m + offset, v + offset, n, k.keep, k.beta2,
                               k.one_minus_beta1, k.one_minus_beta2, k.rate, k.root, k.eps);
                 };
                 if (p.dtype == DType::f32) {
                   step(p.as<float>() + b.first, g.as<const float>() + b.first, 0, b.n);
                   continue;
                 }
                 float values[kBuffer], grads[kBuffer];
                 for (int64_t j = 0; j < b.n; j += kBuffer) {
                   const int64_t n = std::min(kBuffer, b.n - j);
                   simd.to_f32(p.dtype, p.element(b.first + j), values, n);
                   simd.to_f32(g.dtype, g.element(b.first + j), grads, n);
                   step(values, grads, j, n);
                   simd.from_f32(p.dtype, values, p.element(b.first + j), n);
                 }
               }
             });
}

}  // namespace p2r::cpu

// Attention's entry points: each runs the kernel that was chosen by name.
#include "cuda/attention/attention.cuh"
#include "ops/kernel_choice.h"

namespace p2r::cuda {

namespace {

struct NamedKernel {
  const char* name;
  void (*forward)(const AttentionArgs&, Device&);
  void (*backward)(const AttentionBackwardArgs&, Device&);
};

// The names are those of ops/kernel_choice.cpp.
constexpr NamedKernel kKernels[] = {
    {"wgmma", wgmma_attention, wgmma_attention_backward},
    {"mma", mma_attention, mma_attention_backward},
    {"plain", plain_attention, plain_attention_backward},
};

const NamedKernel& kernel_of(int64_t kernel, Device& device) {
  const std::string name = kernel_choices("attention", device.info()).at(kernel).name;
  for (const NamedKernel& k : kKernels)
    if (name == k.name) return k;
  throw Error(Code::value, "there is no kernel '" + name + "'");
}

}  // namespace

void attention(const AttentionArgs& a, Device& device) {
  kernel_of(a.kernel, device).forward(a, device);
}

void attention_backward(const AttentionBackwardArgs& a, Device& device) {
  kernel_of(a.kernel, device).backward(a, device);
}

void attention_mass(const AttentionMassArgs& a, Device& device) {
  const bool is_f32 = attention_layout(a.q, a.k, View(), a.qkv).dtype == DType::f32;
  (is_f32 ? plain_attention_mass : mma_attention_mass)(a, device);
}

}  // namespace p2r::cuda

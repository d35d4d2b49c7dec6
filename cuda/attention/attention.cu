// Attention's entry points: each runs the kernel that was chosen by name.
#include "cuda/attention/attention.cuh"
#include "cuda/attention/grouped.cuh"
#include "ops/kernel_choice.h"

namespace p2r::cuda {

namespace {

struct NamedKernel {
  const char* name;
  void (*forward)(const AttentionArgs&, Device&);
  void (*backward)(const AttentionBackwardArgs&, Device&);
  // With any keys, or null.
  void (*grouped_forward)(const AttentionArgs&, Device&);
  void (*grouped_backward)(const AttentionBackwardArgs&, Device&);
};

// The names are those of ops/kernel_choice.cpp.
constexpr NamedKernel kKernels[] = {
    {"wgmma", wgmma_attention, wgmma_attention_backward, nullptr, nullptr},
    {"mma", mma_attention, mma_attention_backward, mma_grouped_attention,
     mma_grouped_attention_backward},
    {"plain", plain_attention, plain_attention_backward, plain_grouped_attention,
     plain_grouped_attention_backward},
};

const NamedKernel& kernel_of(int64_t kernel, Device& device) {
  const std::string name = kernel_choices("attention", device.info()).at(kernel).name;
  for (const NamedKernel& k : kKernels)
    if (name == k.name) return k;
  throw Error(Code::value, "there is no kernel '" + name + "'");
}

}  // namespace

void attention(const AttentionArgs& args, Device& device) {
  AttentionArgs a = args;
  const Aligned q(a.q, device), k(a.k, device), v(a.v, device), qkv(a.qkv, device);
  const NamedKernel& kernel = kernel_of(a.kernel, device);
  const bool own = sees_own_sequence(attention_layout(a.q, a.k, a.v, a.qkv), a.keys);
  (own ? kernel.forward : kernel.grouped_forward)(a, device);
}

void attention_backward(const AttentionBackwardArgs& args, Device& device) {
  AttentionBackwardArgs a = args;
  const Aligned q(a.q, device), k(a.k, device), v(a.v, device), qkv(a.qkv, device);
  const Aligned d_out(a.d_out, device), out(a.out, device);
  const NamedKernel& kernel = kernel_of(a.kernel, device);
  const bool own = sees_own_sequence(attention_layout(a.q, a.k, a.v, a.qkv), a.keys);
  (own ? kernel.backward : kernel.grouped_backward)(a, device);
}

void attention_mass(const AttentionMassArgs& args, Device& device) {
  AttentionMassArgs a = args;
  const Aligned q(a.q, device), k(a.k, device), qkv(a.qkv, device);
  const bool is_f32 = attention_layout(a.q, a.k, View(), a.qkv).dtype == DType::f32;
  (is_f32 ? plain_attention_mass : mma_attention_mass)(a, device);
}

}  // namespace p2r::cuda

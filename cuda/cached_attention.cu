// Attention over a paged cache: a kernel that copies the new keys and values into their pages, an
// element a thread, then attention of rows over the pages (cuda/attention). The copy reads and
// writes 2 Kv D entries a token, as a decoding step's projection does: nothing beside the keys that
// attention reads, but a launch.
#include "cuda/attention/grouped.cuh"
#include "ops/cached_attention.h"

namespace p2r::cuda {

namespace {

constexpr int kBlock = 256;

// Where a token's keys of head 0 are, in elements from the layer's keys of page 0; other heads are
// `head` elements apart, values `values` elements after.
template <class T>
__global__ void __launch_bounds__(kBlock)
    append_kernel(const T* k, const T* v, const int64_t* places, T* pages, int64_t n, int key_heads,
                  int d, int64_t head, int64_t values) {
  for (int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * kBlock) {
    const int64_t row = i / d;
    T* to = pages + places[row / key_heads] + row % key_heads * head + i % d;
    to[0] = k[i];
    to[values] = v[i];
  }
}

}  // namespace

void cached_attention(const CachedAttentionArgs& a, Device& device) {
  Ints places;  // of every new token
  places.reserve(static_cast<size_t>(a.q.shape[0]));
  const int64_t size = a.page_size(), d = a.q.shape[2], heads = a.k.shape[1];
  const int64_t* table = a.tables.data();
  for (size_t s = 0; s < a.lengths.size(); table += a.pages_of(s++))
    for (int64_t i = 0; i < a.new_tokens(s); ++i) {
      const int64_t slot = a.lengths[s] + i;
      places.push_back(table[slot / size] * a.page_stride() + slot % size * d);
    }
  if (places.empty() || !a.q.size()) return;
  const int64_t* on_device = nullptr;
  const ScratchWorkspace scratch(device,
                                 [&](Workspace& w) { on_device = upload(device, w, places); });
  with_float_type(a.q.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    launch(append_kernel<T>, blocks_for(a.k.size(), kBlock), kBlock, 0, stream_of(device),
           a.k.as<const T>(), a.v.as<const T>(), on_device, reinterpret_cast<T*>(a.layer_keys()),
           a.k.size(), static_cast<int>(heads), static_cast<int>(d), size * d, a.value_offset());
  });
  // Tensor cores read 16 bytes at a time; a cache's pages begin at multiples of that unless a
  // caller made them of a view.
  if (a.q.dtype == DType::f32 || attention_alignment_copy(a.pages))
    return plain_cached_attention(a, device);
  CachedAttentionArgs aligned = a;
  const Aligned q(aligned.q, device);
  mma_cached_attention(aligned, device);
}

}  // namespace p2r::cuda

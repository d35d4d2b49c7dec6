// Attention over a paged cache on the CPU: copies the new keys and values into their pages, then
// runs grouped attention (cpu/attention) with the pages as runs of keys.
#include "ops/cached_attention.h"

#include <cstring>
#include <memory>

#include "cpu/attention/grouped.h"

namespace p2r::cpu {

using namespace attention_kernels;

namespace {

AttentionLayout layout_of(const CachedAttentionArgs& a) {
  AttentionLayout l;
  l.q = a.q.as<char>();
  l.k = a.layer_keys();
  l.v = l.k + a.value_offset() * static_cast<int64_t>(size_of(a.q.dtype));
  l.dtype = a.q.dtype;
  l.tokens = a.q.shape[0];
  l.heads = a.q.shape[1];
  l.head_dim = a.q.shape[2];
  l.row = l.heads * l.head_dim;
  l.key_heads = a.k.shape[1];
  l.key_row = l.head_dim;
  return l;
}

// Copies token by token into the pages; a row of k or v has the heads that a page has apart.
void append(const CachedAttentionArgs& a, CpuDevice& cpu) {
  struct Place {
    int64_t token, at;  // row of k and v, and elements from the layer's keys to the slot of head 0
  };
  std::vector<Place> places;
  places.reserve(static_cast<size_t>(a.q.shape[0]));
  const int64_t size = a.page_size(), d = a.q.shape[2], heads = a.k.shape[1];
  const int64_t* table = a.tables.data();
  for (size_t s = 0; s < a.lengths.size(); table += a.pages_of(s++))
    for (int64_t i = 0; i < a.new_tokens(s); ++i) {
      const int64_t slot = a.lengths[s] + i;
      places.push_back(
          {a.cu_seqlens[s] + i, table[slot / size] * a.page_stride() + slot % size * d});
    }
  const int64_t bytes = static_cast<int64_t>(size_of(a.q.dtype));
  cpu.launch(a.q.shape[0], 16,
             [=, places = std::move(places), k = a.k.as<const char>(), v = a.v.as<const char>(),
              keys = a.layer_keys(),
              values = a.layer_keys() + a.value_offset() * bytes](int64_t begin, int64_t end, int) {
               for (int64_t i = begin; i < end; ++i)
                 for (int64_t h = 0; h < heads; ++h) {
                   const int64_t from = (places[i].token * heads + h) * d * bytes;
                   const int64_t to = (places[i].at + h * size * d) * bytes;
                   std::memcpy(keys + to, k + from, d * bytes);
                   std::memcpy(values + to, v + from, d * bytes);
                 }
             });
}

}  // namespace

void cached_attention(const CachedAttentionArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  append(a, cpu);
  auto g = std::make_shared<Grouped>(Call(cpu, layout_of(a), {}, {}, a.scale));
  g->causal = true;
  g->key_head = a.page_size() * a.q.shape[2];
  const int64_t* table = a.tables.data();
  for (size_t s = 0; s < a.lengths.size(); table += a.pages_of(s++)) {
    const int64_t keys = a.total(s), size = a.page_size(), pages = a.pages_of(s);
    g->sequences.push_back({a.cu_seqlens[s], a.new_tokens(s), keys, 0, keys, g->runs.size()});
    for (int64_t p = 0; p < pages; ++p)
      g->runs.push_back({p * size, std::min(size, keys - p * size), table[p] * a.page_stride()});
  }
  grouped_attention(cpu, std::move(g), a.out.as<char>(), a.lse.as<float>());
}

}  // namespace p2r::cpu

// Weights in 8 or 4 bits (ops/quantize.h): a thread rounds a group of a row, and a thread
// dequantizes a weight; both are done once a weight, and bound by memory.
//
// The linear layer of up to 16 rows. Traffic: values and scales, once. A block owns a panel of 16
// features and up to four rows of x. Its threads take 16 bytes of values each in turn, which are
// consecutive in memory: of 8 bits one channel of all 16 features, of 4 bits eight channels of four
// features. Integers become f32 and are multiplied by their scale, exactly, in registers; all sums
// are f32. Those of the lanes are merged by a fixed tree, those of the warps in order, so that a
// row has the same bits among up to 16. More rows: the weight is written out in x's type (2 bytes a
// weight written and read, in addition to 1 or 0.5), and multiplied by the GEMM.
//
// Predicted (H200, [6144, 2048], 13.4 MB of 8 bits, 7.1 MB of 4, 384 blocks of 8 warps): 1 row
// in 4.5 and 3.2 us, 60 % and 45 % of 4.8 TB/s: three blocks for a multiprocessor have 24 warps
// with 16 to 64 bytes a thread in flight, and a weight of 4 bits takes four instructions, 170 a
// cycle at the full rate of memory.
#include "cuda/gemm/few_rows.cuh"
#include "cuda/linear.cuh"
#include "ops/linear_log_probs.h"
#include "ops/quantize.h"

namespace p2r::cuda {

void token_log_probs(const TokenLogProbsArgs& a, Device& device);
void linear_log_probs(const LinearLogProbsArgs& a, Device& device);

namespace {

constexpr int kBlock = 256, kWarps = kBlock / 32, kRows = 4;
constexpr int kPanel = static_cast<int>(kQuantizedPanel);

// The integer in bits shift .. shift + kBits - 1, in two's complement.
template <int kBits>
__device__ __forceinline__ float integer_at(uint32_t word, int shift) {
  return static_cast<float>(static_cast<int32_t>(word << (32 - kBits - shift)) >> (32 - kBits));
}
// Where column c of eight is in a word of 4 bits.
__host__ __device__ constexpr int nibble_shift(int c) { return c % 2 * 16 + c / 2 * 4; }

template <class T>
__global__ void __launch_bounds__(kBlock)
    quantize_kernel(const T* weight, uint8_t* values, __half* scales, QuantizedLayout layout,
                    FaultFlag fault) {
  const int64_t groups = layout.groups(), count = layout.panels() * groups * kPanel;
  const float largest = layout.bits == 8 ? 127.0f : 7.0f;
  for (int64_t i = blockIdx.x * int64_t{kBlock} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kBlock) {
    const int64_t lane = i % kPanel, index = i / kPanel, g = index % groups;
    const int64_t row = index / groups * kPanel + lane, first = g * layout.group;
    const int64_t left = row < layout.features ? layout.channels - first : 0;
    const int columns = static_cast<int>(left < layout.group ? left : layout.group);
    const T* w = weight + row * layout.channels + first;
    float magnitude = 0;
    for (int c = 0; c < columns; ++c) {
      const float x = fabsf(to_float(w[c]));
      if (x > magnitude || x != x) magnitude = x;
    }
    __half scale = from_float<__half>(magnitude / largest);
    const float s = to_float(scale);
    const bool valid = s < INFINITY;
    if (!valid) {
      scale = from_float<__half>(NAN);
      ptx::raise(fault, row, __float_as_uint(magnitude));
    }
    scales[i] = scale;
    const auto rounded = [&](int c) {
      if (c >= columns || !valid || s == 0) return 0;
      const float q = rintf(to_float(w[c]) / s);
      return static_cast<int>(q < -largest ? -largest : q > largest ? largest : q);
    };
    uint8_t* to = values + index * layout.group_bytes();
    if (layout.bits == 8) {
      for (int c = 0; c < layout.group; ++c)
        to[c * kPanel + lane] = static_cast<uint8_t>(rounded(c));
      continue;
    }
    for (int c = 0; c < layout.group; c += 8) {
      uint32_t word = 0;
      for (int j = 0; j < 8; ++j)
        word |= static_cast<uint32_t>(rounded(c + j) & 15) << nibble_shift(j);
      reinterpret_cast<uint32_t*>(to)[c / 8 * kPanel + lane] = word;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    dequantize_kernel(const uint8_t* values, const __half* scales, T* out, QuantizedLayout layout) {
  const int64_t count = layout.features * layout.channels;
  for (int64_t i = blockIdx.x * int64_t{kBlock} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kBlock) {
    const int64_t row = i / layout.channels, column = i % layout.channels;
    const int64_t index = row / kPanel * layout.groups() + column / layout.group;
    const int lane = static_cast<int>(row % kPanel), c = static_cast<int>(column % layout.group);
    const uint8_t* from = values + index * layout.group_bytes();
    const float q =
        layout.bits == 8
            ? integer_at<8>(from[c * kPanel + lane], 0)
            : integer_at<4>(reinterpret_cast<const uint32_t*>(from)[c / 8 * kPanel + lane],
                            nibble_shift(c % 8));
    out[i] = from_float<T>(q * to_float(scales[index * kPanel + lane]));
  }
}

// What a thread multiplies at once: kChannels channels of kFeatures features.
template <int kBits>
struct Chunk {
  static constexpr int kChannels = kBits == 8 ? 1 : 8, kFeatures = kBits == 8 ? 16 : 4;
  static constexpr int kThreadsPerStep = kPanel / kFeatures;  // for the same channels
  // Feature f, channel c.
  static __device__ __forceinline__ float value(const uint32_t (&words)[4], int f, int c) {
    return kBits == 8 ? integer_at<8>(words[f / 4], f % 4 * 8)
                      : integer_at<4>(words[f], nibble_shift(c));
  }
};

template <class T, int kBits>
__global__ void __launch_bounds__(kBlock)
    quantized_rows_kernel(const T* x, const uint8_t* values, const __half* scales, Bias bias,
                          void* out, bool f32_out, int64_t m, QuantizedLayout layout) {
  typedef Chunk<kBits> C;
  SMEM_ARRAY(float, sums, kWarps* kRows* kPanel);
  const int64_t row_tiles = ceil_div(m, kRows), groups = layout.groups();
  const int64_t panel = blockIdx.x / row_tiles, first_row = blockIdx.x % row_tiles * kRows;
  const int rows = static_cast<int>(m - first_row < kRows ? m - first_row : kRows);
  const int part = static_cast<int>(threadIdx.x) % C::kThreadsPerStep;  // of the panel's features
  const uint8_t* q = values + panel * groups * layout.group_bytes();
  const int64_t chunks = groups * layout.group / C::kChannels * C::kThreadsPerStep;
  float acc[C::kFeatures][kRows] = {};
#pragma unroll 2
  for (int64_t i = threadIdx.x; i < chunks; i += kBlock) {
    const uint4 bytes = reinterpret_cast<const uint4*>(q)[i];
    const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
    const int64_t channel = i / C::kThreadsPerStep * C::kChannels;
    const __half* s =
        scales + (panel * groups + channel / layout.group) * kPanel + part * C::kFeatures;
    float scale[C::kFeatures];
#pragma unroll
    for (int f = 0; f < C::kFeatures; ++f) scale[f] = to_float(s[f]);
#pragma unroll
    for (int c = 0; c < C::kChannels; ++c) {
      if (channel + c >= layout.channels) break;
      float v[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        v[r] = r < rows ? to_float(x[(first_row + r) * layout.channels + channel + c]) : 0.0f;
#pragma unroll
      for (int f = 0; f < C::kFeatures; ++f) {
        const float w = C::value(words, f, c) * scale[f];
#pragma unroll
        for (int r = 0; r < kRows; ++r) acc[f][r] = fmaf(w, v[r], acc[f][r]);
      }
    }
  }
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int f = 0; f < C::kFeatures; ++f)
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float sum = acc[f][r];
#pragma unroll
      for (int step = 16; step >= C::kThreadsPerStep; step /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (lane < C::kThreadsPerStep)
        sums[(warp * kRows + r) * kPanel + part * C::kFeatures + f] = sum;
    }
  __syncthreads();
  const int r = static_cast<int>(threadIdx.x) / kPanel, f = static_cast<int>(threadIdx.x) % kPanel;
  const int64_t feature = panel * kPanel + f;
  if (r >= rows || feature >= layout.features) return;
  float sum = sums[r * kPanel + f];
  for (int i = 1; i < kWarps; ++i) sum += sums[(i * kRows + r) * kPanel + f];
  if (bias.data) sum += bias[feature];
  const int64_t at = (first_row + r) * layout.features + feature;
  if (f32_out)
    static_cast<float*>(out)[at] = sum;
  else
    static_cast<T*>(out)[at] = from_float<T>(sum);
}

// Kernels read 16 bytes of the weight at a time. Values that begin between multiples of 16 are
// copied.
class AlignedValues {
 public:
  AlignedValues(const View& values, Device& device)
      : copy_(device, reinterpret_cast<uintptr_t>(values.data) % 16
                          ? static_cast<size_t>(values.size())
                          : 0),
        data_(values.as<const uint8_t>()) {
    if (!copy_.as<void>()) return;
    device.copy(copy_.as<void>(), values.data, static_cast<size_t>(values.size()));
    data_ = copy_.as<const uint8_t>();
  }
  const uint8_t* data() const { return data_; }

 private:
  Scratch copy_;
  const uint8_t* data_;
};

template <class T>
void dequantize_to(Device& device, const AlignedValues& values, const View& scales, T* out,
                   const QuantizedLayout& layout) {
  const int64_t n = layout.features * layout.channels;
  if (!n) return;
  launch(dequantize_kernel<T>, blocks_for(n, kBlock), kBlock, 0, stream_of(device), values.data(),
         scales.as<const __half>(), out, layout);
}

}  // namespace

void quantize(const QuantizeArgs& a, Device& device) {
  const int64_t n = a.scales.size();
  if (!n) return;
  with_float_type(a.weight.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    launch(quantize_kernel<T>, blocks_for(n, kBlock), kBlock, 0, stream_of(device),
           a.weight.as<const T>(), a.values.as<uint8_t>(), a.scales.as<__half>(), a.layout(),
           a.fault);
  });
}

void dequantize(const DequantizeArgs& a, Device& device) {
  const AlignedValues values(a.values, device);
  dequantize_to(device, values, a.scales, a.out.as<float>(), a.layout());
}

void quantized_linear(const QuantizedLinearArgs& a, Device& device) {
  const QuantizedLayout layout = a.layout();
  const int64_t rows = rows_of(a.x);
  if (!rows || !layout.features) return;
  const AlignedValues values(a.values, device);
  const Bias bias = {a.bias.data, a.bias.dtype};
  with_float_type(a.x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const T* x = a.x.as<const T>();
    if (rows <= few_rows::kMaxRows) {
      const auto blocks = static_cast<unsigned>(layout.panels() * ceil_div(rows, kRows));
      launch(a.bits == 8 ? quantized_rows_kernel<T, 8> : quantized_rows_kernel<T, 4>, blocks,
             kBlock, 0, stream_of(device), x, values.data(), a.scales.as<const __half>(), bias,
             a.out.data, a.out.dtype == DType::f32, rows, layout);
      return;
    }
    const Scratch scratch = device.scratch(layout.features * layout.channels * sizeof(T));
    T* weight = scratch.as<T>();
    dequantize_to(device, values, a.scales, weight, layout);
    multiply_many_rows(device, x, weight, bias, a.out, rows, layout.features, layout.channels);
  });
}

void quantized_linear_log_probs(const QuantizedLinearLogProbsArgs& a, Device& device) {
  const QuantizedLayout layout = a.layout();
  const int64_t rows = a.hidden.shape[0];
  if (!rows) return;
  const auto with_results = [&](auto args) {
    args.targets = a.targets;
    args.temperature = a.temperature;
    args.log_probs = a.log_probs;
    args.stats = a.stats;
    args.entropy = a.entropy;
    args.squared_probs = a.squared_probs;
    args.fault = a.fault;
    return args;
  };
  if (rows <= few_rows::kMaxRows) {
    const Scratch scratch = device.scratch(rows * layout.features * sizeof(float));
    QuantizedLinearArgs product;
    product.x = a.hidden;
    product.values = a.values;
    product.scales = a.scales;
    product.bias = a.bias;
    product.bits = a.bits;
    product.group = a.group;
    product.out.data = scratch.as<float>();
    product.out.shape = {rows, layout.features};
    quantized_linear(product, device);
    auto args = with_results(TokenLogProbsArgs{});
    static_cast<View&>(args.logits) = product.out;
    return token_log_probs(args, device);
  }
  const AlignedValues values(a.values, device);
  with_float_type(a.hidden.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const Scratch scratch = device.scratch(layout.features * layout.channels * sizeof(T));
    dequantize_to(device, values, a.scales, scratch.as<T>(), layout);
    auto args = with_results(LinearLogProbsArgs{});
    args.hidden = a.hidden;
    args.bias = a.bias;
    args.weight.data = scratch.as<T>();
    args.weight.dtype = a.hidden.dtype;
    args.weight.shape = {layout.features, layout.channels};
    linear_log_probs(args, device);
  });
}

}  // namespace p2r::cuda

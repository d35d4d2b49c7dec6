// Logits are made where they are used: a thread multiplies a block of the weight's rows, read as
// they lie, with the packed hidden states of a chunk of rows, and hands the block's logits on while
// they are in the cache. They are [columns of the vocabulary][rows]: the weight, which is read once
// and is most of the memory, needs no packing, and a row is a lane, so that its maximum and sums
// never cross lanes. Where gradients are taken, the blocks are turned around as they are put down.
//
//   for each chunk of rows that take part, found by reading the targets:
//     pack their hidden states, for all threads
//     forward:   for each span of the vocabulary: for each block: logits -> the rows' running sums
//                merge every row's spans in order
//     backward:  for each part of the vocabulary: logits -> dz, in place; then three products of dz
//     the loss:  logits -> a chunk of them, and sums; the loss's gradient; dz in place; products
//
// How the vocabulary is cut follows from V and C alone.
#include "ops/linear_log_probs.h"

#include <algorithm>

#include "cpu/gemm.h"
#include "cpu/log_probs.h"

namespace p2r::cpu {

void policy_loss(const PolicyLossArgs& a, Device& device);

namespace {

constexpr int64_t kMostPanel = 32;             // rows of the widest panel of hidden states
constexpr int64_t kWholeTiles = 24;            // columns: whole register tiles on every CPU
constexpr int64_t kMostColumns = 96;           // of a block
constexpr int64_t kBlock = 128 * 1024;         // words of a block of weight: 512 KiB of L2
constexpr int64_t kBlockK = 256;               // words: a panel of 32 rows, 32 KiB, fits L1
constexpr int64_t kPanels = 768 * 1024;        // words of packed hidden states: 3 MiB of L3
constexpr int64_t kMostRows = 768;             // of a chunk
constexpr int64_t kFewestRows = 96;            // of which a chunk has a multiple
constexpr int64_t kSumColumns = 512;           // of the bias's gradient at once
constexpr int64_t kMostSpans = 128;            // of the vocabulary
constexpr int64_t kSlopes = 8 * 1024 * 1024;   // floats of dz backward
constexpr int64_t kLogits = 32 * 1024 * 1024;  // floats of logits of the policy loss
constexpr int64_t kStretch = 4096;             // columns that a thread takes of a long row

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

const char* at(const View& v, int64_t i) { return v.as<char>() + i * int64_t(size_of(v.dtype)); }

enum class Part { taken, skipped, wrong };

// The layer, how it is cut, and the memory for one chunk of rows.
struct Head {
  In hidden, weight, bias, targets;
  int64_t rows, columns, channels;
  double inverse;

  bool pairs;     // whether a word of the product holds two bf16
  bool in_words;  // whether the weight is made of such words as it lies
  int64_t most;   // rows of a chunk
  int64_t pitch;  // of a block's logits; no power of two, or they would share their places in L1
  int64_t block;  // columns
  int64_t span, spans;
  bool moment = false;

  int64_t* list = nullptr;        // the chunk's rows
  float* panels = nullptr;        // their hidden states, packed
  float* words = nullptr;         // a block of the weight, by thread, unless it is in_words
  float* logits = nullptr;        // of a block, by thread
  float* partials = nullptr;      // [most, spans, 3]
  float* running = nullptr;       // [threads, 3, pitch]
  float* target_logit = nullptr;  // [most]

  template <class Args>
  Head(const Args& a, const CpuDevice& cpu, int64_t most_rows)
      : hidden(a.hidden),
        weight(a.weight),
        bias(a.bias),
        targets(a.targets),
        rows(a.hidden.shape[0]),
        columns(a.weight.shape[0]),
        channels(a.weight.shape[1]),
        inverse(1 / a.temperature),
        pairs(cpu.features().bf16 && a.weight.dtype == DType::bf16),
        in_words(a.weight.dtype == DType::f32 || (pairs && channels % 2 == 0)) {
    const int64_t deep = std::max<int64_t>(depth(channels), 1);
    const int64_t fit =
        std::clamp(kPanels / deep / kFewestRows * kFewestRows, kFewestRows, kMostRows);
    most = std::min({fit, std::max<int64_t>(rows, 1), most_rows});
    pitch = padded() + 16;
    block = std::clamp(kBlock / deep / kWholeTiles * kWholeTiles, kWholeTiles, kMostColumns);
    span = round_up(std::max<int64_t>(ceil_div(columns, kMostSpans), 1), block);
    spans = ceil_div(columns, span);
  }

  int64_t padded() const { return round_up(most, kMostPanel); }
  // Words for k channels, and the channels of a block of them.
  int64_t depth(int64_t k) const { return pairs ? (k + 1) / 2 : k; }
  int64_t block_k() const { return pairs ? 2 * kBlockK : kBlockK; }
  int64_t word_floats() const { return in_words ? 0 : block * depth(channels); }
  int64_t logit_floats() const { return block * pitch; }
  Part part(int64_t row) const {
    const int32_t target = targets.as<int32_t>()[row];
    return target == kSkippedTarget          ? Part::skipped
           : target < 0 || target >= columns ? Part::wrong
                                             : Part::taken;
  }
  int32_t target(int64_t i) const { return targets.as<int32_t>()[list[i]]; }
};

// Memory of one call, cut into pieces; without memory only their size is counted.
struct Pieces {
  char* memory = nullptr;
  int64_t bytes = 0;

  template <class T>
  void lay(T*& piece, int64_t count) {
    if (memory) piece = reinterpret_cast<T*>(memory + bytes);
    bytes += round_up(count * int64_t(sizeof(T)), 64);
  }
};

// Sized by a first laying out, then laid out.
template <class F>
class Laid {
 public:
  Laid(Device& device, const F& lay) : scratch_(device, bytes_of(lay)) {
    Pieces pieces = {scratch_.as<char>(), 0};
    lay(pieces);
  }

 private:
  static int64_t bytes_of(const F& lay) {
    Pieces pieces;
    lay(pieces);
    return pieces.bytes;
  }
  Scratch scratch_;
};

void lay(Pieces& pieces, Head& h, const CpuDevice& cpu, bool sums) {
  pieces.lay(h.list, h.most);
  pieces.lay(h.panels, h.padded() * h.depth(h.channels));
  pieces.lay(h.words, cpu.threads() * h.word_floats());
  pieces.lay(h.logits, cpu.threads() * h.logit_floats());
  if (!sums) return;
  pieces.lay(h.partials, h.most * h.spans * 3);
  pieces.lay(h.running, cpu.threads() * 3 * h.pitch);
  pieces.lay(h.target_logit, h.most);
}

// The rows from `next` on that part(row) takes, until the chunk is full.
template <class F>
int64_t take_rows(const Head& h, int64_t& next, const F& part) {
  int64_t taken = 0;
  for (; next < h.rows && taken < h.most; ++next)
    if (part(next) == Part::taken) h.list[taken++] = next;
  return taken;
}

// Blocks of k one after the other, each with the panels of all rows.
void pack_rows(CpuDevice& cpu, const Head& h, int64_t taken) {
  int mr, nr;
  cpu.simd().gemm_tile_size(&mr, &nr);
  cpu.parallel(ceil_div(taken, nr), 1, [&](int64_t begin, int64_t end, int) {
    const Simd& simd = cpu.simd();
    float lines[kMostPanel * 2 * kBlockK];
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * nr, n = std::min<int64_t>(nr, taken - first);
      for (int64_t k0 = 0; k0 < h.channels; k0 += h.block_k()) {
        const int64_t k = std::min(h.block_k(), h.channels - k0);
        for (int64_t r = 0; r < n; ++r)
          simd.to_f32(h.hidden.dtype, at(h.hidden, h.list[first + r] * h.channels + k0),
                      lines + r * k, k);
        simd.pack_b(h.pairs, DType::f32, lines, 1, k, k, n,
                    h.panels + h.depth(k0) * h.padded() + first * h.depth(k));
      }
    }
  });
}

// The weight's rows first .. first + n in words, depth(channels) apart.
const float* words_of(const Simd& simd, const Head& h, int64_t first, int64_t n, float* room) {
  const char* rows = at(h.weight, first * h.channels);
  if (h.in_words) return reinterpret_cast<const float*>(rows);
  to_words(simd, h.pairs, h.weight.dtype, rows, h.channels, n, h.channels, room,
           h.depth(h.channels));
  return room;
}

// The logits of the chunk's rows in columns first .. first + n: [n][pitch], a row a lane, with
// whatever they may be in the lanes up to a whole vector.
const float* make_logits(const Simd& simd, const Head& h, int64_t taken, int64_t first, int64_t n,
                         int thread) {
  int mr, nr;
  simd.gemm_tile_size(&mr, &nr);
  float* logits = h.logits + thread * h.logit_floats();
  const float* words = words_of(simd, h, first, n, h.words + thread * h.word_floats());
  const int64_t lanes = round_up(taken, simd.vector_width()), deep = h.depth(h.channels);
  float bias[kMostColumns];
  if (h.bias) simd.to_f32(h.bias.dtype, at(h.bias, first), bias, n);
  if (h.bias || h.channels == 0)
    for (int64_t j = 0; j < n; ++j) std::fill_n(logits + j * h.pitch, lanes, h.bias ? bias[j] : 0);
  // The next block's weights are asked for meanwhile, as they are mostly this thread's next ones.
  const int64_t next = first + n, size = h.channels * static_cast<int64_t>(size_of(h.weight.dtype));
  Ahead ahead;
  ahead.line = at(h.weight, next * h.channels);
  ahead.left = ahead.lines = std::max<int64_t>(std::min(n, h.columns - next), 0) * size / 64;
  ahead.rows = ahead.lines > 0;
  spread(ahead, chances_of(simd, n, lanes, deep));
  for (int64_t k0 = 0; k0 < h.channels; k0 += h.block_k())
    simd.gemm_rows(h.pairs, {.m = n,
                             .n = lanes,
                             .k = std::min(h.block_k(), h.channels - k0),
                             .a = words + h.depth(k0),
                             .lda = deep,
                             .b = h.panels + h.depth(k0) * h.padded(),
                             .ldb = nr,
                             .c = logits,
                             .ldc = h.pitch,
                             .accumulate = h.bias || k0,
                             .ahead = &ahead});
  return logits;
}

// The sums of every row of the chunk over every span. The logits go to `chunk`, [taken, columns],
// unless it is null.
void sum_spans(CpuDevice& cpu, const Head& h, int64_t taken, float* chunk) {
  cpu.parallel(h.spans, 1, [&](int64_t begin, int64_t end, int thread) {
    const Simd& simd = cpu.simd();
    const int64_t lanes = round_up(taken, simd.vector_width());
    float* running = h.running + thread * 3 * h.pitch;
    for (int64_t s = begin; s < end; ++s) {
      std::fill_n(running, h.pitch, static_cast<float>(-kInfinity));
      std::fill_n(running + h.pitch, 2 * h.pitch, 0.0f);
      const int64_t stop = std::min(h.columns, (s + 1) * h.span);
      for (int64_t first = s * h.span; first < stop; first += h.block) {
        const int64_t n = std::min(h.block, stop - first);
        const float* logits = make_logits(simd, h, taken, first, n, thread);
        simd.softmax_lanes(n, h.pitch, lanes, static_cast<float>(h.inverse), h.moment, logits,
                           running);
        for (int64_t i = 0; i < taken; ++i) {
          const int64_t label = h.target(i) - first;
          if (label >= 0 && label < n) h.target_logit[i] = logits[label * h.pitch + i];
        }
        if (chunk) simd.transpose(n, taken, logits, h.pitch, chunk + first, h.columns);
      }
      for (int64_t i = 0; i < taken; ++i)
        for (int64_t k = 0; k < 3; ++k)
          h.partials[(i * h.spans + s) * 3 + k] = running[k * h.pitch + i];
    }
  });
}

RowLogProb merged(const Head& h, int64_t i) {
  return row_log_prob(merge_slices(h.partials + i * h.spans * 3, h.spans, h.inverse),
                      h.target_logit[i], h.inverse);
}

// What dz is multiplied into.
struct Gradients {
  Out d_hidden;
  View weight, bias;          // dweight and dbias; bias may be absent
  bool add, add_bias;         // to what they hold
  float* hidden = nullptr;    // [most, C], the chunk's hidden states
  float* products = nullptr;  // [most, C], their gradients
  float* memory = nullptr;    // gemm_now's

  template <class Args>
  explicit Gradients(const Args& a)
      : d_hidden(a.d_hidden),
        weight(a.into_weight ? View(a.into_weight) : View(a.d_weight)),
        bias(a.into_bias ? View(a.into_bias) : View(a.d_bias)),
        add(bool(a.into_weight)),
        add_bias(bool(a.into_bias)) {}

  void lay(Pieces& pieces, const Head& h, const CpuDevice& cpu) {
    pieces.lay(hidden, h.most * h.channels);
    pieces.lay(products, h.most * h.channels);
    pieces.lay(memory, gemm_floats(cpu, h.channels));
  }
};

// How far a call has come; lives in its memory.
struct Progress {
  int64_t next, taken;
  bool started, wrong;  // whether dweight holds something; whether a target was wrong
};

void fill_row(const View& v, int64_t row, int64_t width, float x) {
  char* to = const_cast<char*>(at(v, row * width));
  if (v.dtype == DType::f32)
    std::fill_n(reinterpret_cast<float*>(to), width, x);
  else  // 0, or a NaN of either type
    std::fill_n(reinterpret_cast<uint16_t*>(to), width, uint16_t(x == 0 ? 0 : 0x7fff));
}

// Says what becomes of a row where the gradients are taken, and settles it there unless it takes
// part.
Part sort_row(const Head& h, const Gradients& g, int64_t row, Part part, Progress& p,
              int32_t* fault) {
  if (part == Part::taken) return part;
  if (part == Part::wrong) {
    *fault = 1;
    p.wrong = true;
  }
  fill_row(g.d_hidden, row, h.channels, part == Part::wrong ? kNan : 0);
  return part;
}

// dz of the columns first .. first + n of row i of the chunk, whose logits are z; dz may be z.
void make_slopes(const Simd& simd, const Head& h, int64_t i, const RowSlope& slope, const float* z,
                 float* dz, int64_t first, int64_t n) {
  const int64_t label = h.target(i) - first;
  const bool here = label >= 0 && label < n;
  const double x = here ? z[label] : 0;
  simd.softmax_slopes(DType::f32, z, dz, n, &slope.row);
  if (here) dz[label] = slope.at_target(x);
}

void load_hidden(CpuDevice& cpu, const Head& h, const Gradients& g, int64_t taken) {
  cpu.parallel(taken, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i)
      cpu.simd().to_f32(h.hidden.dtype, at(h.hidden, h.list[i] * h.channels),
                        g.hidden + i * h.channels, h.channels);
  });
}

// Adds what dz [taken, n], of the columns from `first` on, is multiplied into.
void multiply(CpuDevice& cpu, const Head& h, const Gradients& g, int64_t taken, const float* dz,
              int64_t pitch, int64_t first, int64_t n, bool started) {
  const Matrix slopes = {dz, DType::f32, pitch, 1};
  gemm_now(cpu,
           {.m = taken,
            .n = h.channels,
            .k = n,
            .a = slopes,
            .b = matrix_of(h.weight).from(first, 0),
            .c = g.products,
            .c_row_stride = h.channels,
            .accumulate = first > 0},
           g.memory);
  gemm_now(cpu,
           {.m = n,
            .n = h.channels,
            .k = taken,
            .a = slopes.transposed(),
            .b = {g.hidden, DType::f32, h.channels, 1},
            .c = g.weight.as<float>() + first * h.channels,
            .c_row_stride = h.channels,
            .accumulate = g.add || started},
           g.memory);
  if (!g.bias) return;
  const bool add = g.add_bias || started;
  cpu.parallel(ceil_div(n, kSumColumns), 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t skip = c * kSumColumns, width = std::min(kSumColumns, n - skip);
      float sums[kSumColumns] = {};
      for (int64_t i = 0; i < taken; ++i)
        for (int64_t j = 0; j < width; ++j) sums[j] += dz[i * pitch + skip + j];
      float* to = g.bias.as<float>() + first + skip;
      for (int64_t j = 0; j < width; ++j) to[j] = add ? to[j] + sums[j] : sums[j];
    }
  });
}

void store_hidden(CpuDevice& cpu, const Head& h, const Gradients& g, int64_t taken) {
  cpu.parallel(taken, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i)
      cpu.simd().from_f32(g.d_hidden.dtype, g.products + i * h.channels,
                          const_cast<char*>(at(g.d_hidden, h.list[i] * h.channels)), h.channels);
  });
}

// dweight and dbias where no row took part, or a target was wrong.
void settle(CpuDevice& cpu, const Head& h, const Gradients& g, const Progress& p) {
  const float x = p.wrong ? kNan : 0;
  const bool weight = p.wrong || !(p.started || g.add);
  const bool bias = g.bias && (p.wrong || !(p.started || g.add_bias));
  cpu.parallel(h.columns, 64, [&](int64_t begin, int64_t end, int) {
    for (int64_t j = begin; j < end && (weight || bias); ++j) {
      if (weight) fill_row(g.weight, j, h.channels, x);
      if (bias) g.bias.as<float>()[j] = x;
    }
  });
}

}  // namespace

void linear_log_probs(const LinearLogProbsArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  Head h(a, cpu, kMostRows);
  h.moment = bool(a.entropy);
  const Laid memory(device, [&](Pieces& pieces) { lay(pieces, h, cpu, true); });
  cpu.submit([=, &cpu] {
    const auto write = [&](int64_t row, const RowLogProb& r) {
      a.log_probs.as<float>()[row] = r.log_prob;
      a.stats.as<float>()[2 * row] = r.stats[0];
      a.stats.as<float>()[2 * row + 1] = r.stats[1];
      if (a.entropy) a.entropy.as<float>()[row] = r.entropy;
    };
    for (int64_t next = 0; next < h.rows;) {
      const int64_t taken = take_rows(h, next, [&](int64_t row) {
        const Part part = h.part(row);
        if (part == Part::wrong) *a.fault = 1;
        if (part != Part::taken) write(row, part == Part::wrong ? kNoLogProb : RowLogProb{});
        return part;
      });
      if (!taken) continue;
      pack_rows(cpu, h, taken);
      sum_spans(cpu, h, taken, nullptr);
      for (int64_t i = 0; i < taken; ++i) write(h.list[i], merged(h, i));
    }
  });
}

void linear_log_probs_backward(const LinearLogProbsBackwardArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  Head h(a, cpu, kMostRows);
  Gradients g(a);
  // Columns of dz at once.
  const int64_t part = std::min(round_up(std::max<int64_t>(h.columns, 1), h.block),
                                std::max<int64_t>(kSlopes / h.most / h.block, 1) * h.block);
  float* dz = nullptr;
  const Laid memory(device, [&](Pieces& pieces) {
    lay(pieces, h, cpu, false);
    g.lay(pieces, h, cpu);
    pieces.lay(dz, h.most * part);
  });
  cpu.submit([=, &cpu] {
    const Simd& simd = cpu.simd();
    const auto slopes_of = [&](int64_t row, double& dg, double& dh) {
      dg = a.d_log_probs.as<float>()[row] * h.inverse;
      dh = a.d_entropy ? a.d_entropy.as<float>()[row] * h.inverse : 0;
    };
    Progress p = {0, 0, false, false};
    while (p.next < h.rows) {
      const int64_t taken = take_rows(h, p.next, [&](int64_t row) {
        double dg, dh;
        slopes_of(row, dg, dh);
        const Part part = h.part(row);
        const bool teaches = part == Part::wrong || dg != 0 || dh != 0;
        return sort_row(h, g, row, teaches ? part : Part::skipped, p, a.fault);
      });
      if (!taken) continue;
      pack_rows(cpu, h, taken);
      load_hidden(cpu, h, g, taken);
      for (int64_t first = 0; first < h.columns; first += part) {
        const int64_t n = std::min(part, h.columns - first);
        cpu.parallel(ceil_div(n, h.block), 1, [&](int64_t begin, int64_t end, int thread) {
          for (int64_t b = begin; b < end; ++b) {
            const int64_t skip = b * h.block, width = std::min(h.block, n - skip);
            float* to = dz + skip;
            simd.transpose(width, taken, make_logits(simd, h, taken, first + skip, width, thread),
                           h.pitch, to, part);
            for (int64_t i = 0; i < taken; ++i) {
              const int64_t row = h.list[i];
              double dg, dh;
              slopes_of(row, dg, dh);
              const RowSlope slope(h.inverse, a.stats.as<float>() + 2 * row, dg, dh,
                                   dh != 0 ? a.entropy.as<float>()[row] : 0);
              make_slopes(simd, h, i, slope, to + i * part, to + i * part, first + skip, width);
            }
          }
        });
        multiply(cpu, h, g, taken, dz, part, first, n, p.started);
      }
      store_hidden(cpu, h, g, taken);
      p.started = true;
    }
    settle(cpu, h, g, p);
  });
}

void linear_policy_loss(const LinearPolicyLossArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t columns = a.weight.shape[0];
  Head h(a, cpu,
         std::max(kLogits / std::max<int64_t>(columns, 1) / kMostPanel, int64_t{1}) * kMostPanel);
  Gradients g(a);
  h.moment = a.loss.entropy_coef != 0;
  float *logits = nullptr, *stats = nullptr, *entropy = nullptr, *d_log_probs = nullptr,
        *d_entropy = nullptr;
  Progress* progress = nullptr;
  const Laid memory(device, [&](Pieces& pieces) {
    lay(pieces, h, cpu, true);
    g.lay(pieces, h, cpu);
    pieces.lay(logits, h.most * h.columns);
    pieces.lay(stats, h.most * 2);
    pieces.lay(d_log_probs, std::max<int64_t>(h.rows, 1));
    pieces.lay(progress, 1);
    if (!h.moment) return;
    pieces.lay(entropy, std::max<int64_t>(h.rows, 1));
    pieces.lay(d_entropy, std::max<int64_t>(h.rows, 1));
  });

  const auto tokens = [&](float* data) {
    View v;
    v.data = data;
    v.shape = {h.rows};
    return v;
  };
  PolicyLossArgs loss = a.loss;
  loss.fault = a.fault;
  static_cast<View&>(loss.log_probs) = a.log_probs;
  static_cast<View&>(loss.d_log_probs) = tokens(d_log_probs);
  if (h.moment) {
    static_cast<View&>(loss.entropy) = tokens(entropy);
    static_cast<View&>(loss.d_entropy) = tokens(d_entropy);
  }

  float* log_probs = a.log_probs.as<float>();
  cpu.submit([=] {
    *progress = {0, 0, false, false};
    std::fill_n(log_probs, h.rows, 0.0f);
    if (entropy) std::fill_n(entropy, h.rows, 0.0f);
  });
  for (int64_t first = 0; first == 0 || first < h.rows; first += h.most) {
    cpu.submit([=, &cpu] {
      Progress& p = *progress;
      p.taken = take_rows(h, p.next, [&](int64_t row) {
        const Part part = h.part(row);
        if (part == Part::wrong) {
          log_probs[row] = kNan;
          if (entropy) entropy[row] = kNan;
        }
        return sort_row(h, g, row, part, p, a.fault);
      });
      if (!p.taken) return;
      pack_rows(cpu, h, p.taken);
      sum_spans(cpu, h, p.taken, logits);
      for (int64_t i = 0; i < p.taken; ++i) {
        const RowLogProb r = merged(h, i);
        log_probs[h.list[i]] = r.log_prob;
        if (entropy) entropy[h.list[i]] = r.entropy;
        stats[2 * i] = r.stats[0];
        stats[2 * i + 1] = r.stats[1];
      }
    });
    // A token's gradient depends on its own log-probability alone, so it is right as soon as that
    // is known; the loss is right after the last chunk. This costs next to nothing beside the
    // products.
    policy_loss(loss, device);
    cpu.submit([=, &cpu] {
      const Simd& simd = cpu.simd();
      Progress& p = *progress;
      if (!p.taken) return;
      const auto slope_of = [&](int64_t i) {
        const int64_t row = h.list[i];
        const double dh = d_entropy ? d_entropy[row] * h.inverse : 0;
        return RowSlope(h.inverse, stats + 2 * i, d_log_probs[row] * h.inverse, dh,
                        dh != 0 ? entropy[row] : 0);
      };
      const auto teaches = [&](const RowSlope& s) { return s.g != 0 || s.h != 0; };
      // dz over the logits, the rows that teach nothing left out: the others move up.
      cpu.parallel(ceil_div(h.columns, kStretch), 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t s = begin; s < end; ++s) {
          const int64_t skip = s * kStretch, width = std::min(kStretch, h.columns - skip);
          int64_t to = 0;
          for (int64_t i = 0; i < p.taken; ++i) {
            const RowSlope slope = slope_of(i);
            if (!teaches(slope)) continue;
            make_slopes(simd, h, i, slope, logits + i * h.columns + skip,
                        logits + to++ * h.columns + skip, skip, width);
          }
        }
      });
      int64_t left = 0;
      for (int64_t i = 0; i < p.taken; ++i) {
        if (teaches(slope_of(i)))
          h.list[left++] = h.list[i];
        else
          fill_row(g.d_hidden, h.list[i], h.channels, 0);
      }
      if (!left) return;
      load_hidden(cpu, h, g, left);
      multiply(cpu, h, g, left, logits, h.columns, 0, h.columns, p.started);
      store_hidden(cpu, h, g, left);
      p.started = true;
    });
  }
  cpu.submit([=, &cpu] { settle(cpu, h, g, *progress); });
}

}  // namespace p2r::cpu

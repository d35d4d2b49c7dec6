#include "ops/recording.h"

#include <algorithm>
#include <fstream>

#include "ops/error.h"

namespace p2r {

namespace {

constexpr char kMagic[8] = {'P', '2', 'R', 'C', 'A', 'S', 'E', '2'};

struct Writer {
  std::ofstream file;
  template <class T>
  void one(const T& value) {
    file.write(reinterpret_cast<const char*>(&value), sizeof value);
  }
  template <class T>
  void many(const T& values) {
    one(static_cast<uint64_t>(values.size()));
    file.write(reinterpret_cast<const char*>(values.data()), values.size() * sizeof values[0]);
  }
};

struct Reader {
  explicit Reader(const std::string& path) : file(path, std::ios::binary | std::ios::ate) {
    bytes = file ? static_cast<uint64_t>(file.tellg()) : 0;
    file.seekg(0);
  }
  std::ifstream file;
  uint64_t bytes;  // no list of the file has more entries
  template <class T>
  void one(T& value) {
    file.read(reinterpret_cast<char*>(&value), sizeof value);
  }
  template <class T>
  void many(T& values) {
    uint64_t n = 0;
    one(n);
    if (!file || n > bytes / sizeof values[0]) throw Error(Code::format, "the case ends early");
    values.resize(n);
    file.read(reinterpret_cast<char*>(values.data()), n * sizeof values[0]);
  }
};

template <class Stream, class Field>
void transfer(Stream& s, Field& f) {
  s.one(f.kind);
  s.one(f.number);
  uint8_t present = f.view ? 1 : 0;
  s.one(present);
  f.view.data = present ? f.view.data : nullptr;
  s.one(f.view.dtype);
  s.one(f.view.shape);
  s.one(f.address);
  s.many(f.ints);
  s.many(f.numbers);
  s.many(f.before);
  s.many(f.after);
  if constexpr (std::is_same_v<Stream, Reader>) {
    const Shape& shape = f.view.shape;
    if (f.kind > Field::Kind::numbers || f.view.dtype > DType::u8 || shape.rank < 0 ||
        shape.rank > kMaxRank ||
        std::any_of(shape.dim, shape.dim + shape.rank, [](int64_t n) { return n < 0; }) ||
        !shape.is_representable())
      throw Error(Code::format, "a field is none");
    f.view.data = present ? &f : nullptr;  // a placeholder until the runner allocates
  }
}

}  // namespace

void write_case(const std::string& path, const Case& c) {
  Writer w{std::ofstream(path, std::ios::binary)};
  w.one(kMagic);
  w.many(c.function);
  w.one(c.bound);
  w.one(c.fault);
  w.one(static_cast<uint64_t>(c.fields.size()));
  for (Field f : c.fields) transfer(w, f);
  if (!w.file.flush()) throw Error(Code::io, "cannot write " + path);
}

Case read_case(const std::string& path) {
  Reader r(path);
  if (!r.file) throw Error(Code::io, "cannot read " + path);
  char magic[8] = {};
  r.one(magic);
  if (std::string(magic, 8) != std::string(kMagic, 8))
    throw Error(Code::format, path + " is not a recorded case");
  Case c;
  uint64_t n = 0;
  r.many(c.function);
  r.one(c.bound);
  r.one(c.fault);
  r.one(n);
  if (!r.file || n > r.bytes) throw Error(Code::format, path + " ends early");
  c.fields.resize(n);
  for (Field& f : c.fields) transfer(r, f);
  if (!r.file) throw Error(Code::format, path + " ends early");
  return c;
}

}  // namespace p2r

#include "ops/recording.h"

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
  std::ifstream file;
  template <class T>
  void one(T& value) {
    file.read(reinterpret_cast<char*>(&value), sizeof value);
  }
  template <class T>
  void many(T& values) {
    uint64_t n = 0;
    one(n);
    if (!file) throw Error(Code::format, "the case ends early");
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
  if constexpr (std::is_same_v<Stream, Reader>)  // a placeholder until the runner allocates
    f.view.data = present ? &f : nullptr;
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
  Reader r{std::ifstream(path, std::ios::binary)};
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
  if (!r.file) throw Error(Code::format, path + " ends early");
  c.fields.resize(n);
  for (Field& f : c.fields) transfer(r, f);
  if (!r.file) throw Error(Code::format, path + " ends early");
  return c;
}

}  // namespace p2r

// The tables of test/golden/hopper.br, described in test/golden/README.md: the layouts of the
// operands of Hopper's instructions, from CuTe's layout algebra.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace hopper {

// A value of a JSON file. Reading a field or an entry that is not there throws.
struct Json {
  double number = 0;  // a boolean as 0 or 1
  std::string text;
  std::vector<Json> entries;
  std::map<std::string, Json> fields;

  const Json& operator[](const std::string& field) const { return fields.at(field); }
  const Json& operator[](const char* field) const { return fields.at(field); }
  const Json& operator[](size_t i) const { return entries.at(i); }
  const Json& operator[](int i) const { return entries.at(static_cast<size_t>(i)); }
  operator int() const { return static_cast<int>(number); }
};
Json read_json(const std::string& path);

// A mixed-radix sum: index i is (i % extent) * bytes of the first pair, plus the same of the next
// by i / extent.
using Layout = std::vector<std::pair<int, int>>;  // extent, bytes

// A tile in shared memory, and the descriptors by which wgmma reads it as an operand.
struct Form {
  std::string id;
  bool is_a, mn_major;
  bool canonical;  // false: CuTe has no tile of this N
  int swizzle;     // bytes of a row, 0 without
  int tile_mn, tile_k, instruction_mn, bytes;
  uint32_t base;  // where the tables have the tile
  int leading, stride;
  bool leading_matters, stride_matters;
  std::vector<std::vector<uint64_t>> descriptors;  // [rows of instruction_mn][16 of k]
  Layout mn, k;
  std::vector<int> chunks;   // where the swizzle moves each 16 bytes of 1024
  std::vector<int> tma_box;  // innermost first; empty where no kernel loads the tile
  std::string fnv1a;
  std::vector<Json> samples;

  int steps() const { return static_cast<int>(descriptors[0].size()); }
  // Rows from one descriptor's first to the next's.
  int rows_apart() const { return canonical ? instruction_mn : tile_mn; }
  // Where the tile at `base` has element (mn, k).
  uint32_t address(int mn_index, int k_index) const;
};

struct Tables {
  explicit Tables(const std::string& folder);
  const Form& form(const std::string& id) const;

  Json fragments, swizzle, descriptors, rules;
  std::map<std::string, Form> forms;
};

}  // namespace hopper

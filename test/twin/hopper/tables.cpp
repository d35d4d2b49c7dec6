#include "test/twin/hopper/tables.h"

#include <cctype>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <stdexcept>

namespace hopper {
namespace {

class Reader {
 public:
  explicit Reader(std::string text) : text_(std::move(text)) {}

  Json value() {
    Json json;
    switch (next()) {
      case '{':
        each('}', [&] {
          const std::string field = value().text;
          expect(':');
          json.fields[field] = value();
        });
        break;
      case '[':
        each(']', [&] { json.entries.push_back(value()); });
        break;
      case '"': {
        const size_t end = text_.find('"', at_ + 1);
        json.text = text_.substr(at_ + 1, end - at_ - 1);
        at_ = end + 1;
        break;
      }
      case 't':
        json.number = 1;
        at_ += 4;
        break;
      case 'f':
        at_ += 5;
        break;
      default: {
        char* end;
        json.number = std::strtod(text_.c_str() + at_, &end);
        at_ = static_cast<size_t>(end - text_.c_str());
      }
    }
    return json;
  }

 private:
  char next() {
    while (std::isspace(static_cast<unsigned char>(text_.at(at_)))) ++at_;
    return text_.at(at_);
  }
  void expect(char c) {
    if (next() != c) throw std::runtime_error("not JSON: " + text_.substr(at_, 40));
    ++at_;
  }
  template <class F>
  void each(char end, F read) {
    for (++at_; next() != end; read())
      if (next() == ',') ++at_;
    ++at_;
  }

  std::string text_;
  size_t at_ = 0;
};

Layout layout_of(const Json& pairs) {
  Layout layout;
  for (const Json& pair : pairs.entries) layout.push_back({pair[0], pair[1]});
  return layout;
}

std::vector<int> ints_of(const Json& list) { return {list.entries.begin(), list.entries.end()}; }

Form form_of(const Json& json, const Json& modes) {
  Form f;
  f.id = json["id"].text;
  f.is_a = json["operand"].text == "A";
  f.mn_major = json["major"].text == "MN";
  f.canonical = json["canonical"];
  f.swizzle = json["swizzle"];
  f.tile_mn = json["tile_mn"];
  f.tile_k = json["tile_k"];
  f.instruction_mn = json["instruction_mn"];
  f.bytes = json["bytes"];
  f.base = static_cast<uint32_t>(int(json["base"]));
  f.leading = json["lbo"];
  f.stride = json["sbo"];
  f.leading_matters = json["lbo_matters"];
  f.stride_matters = json["sbo_matters"];
  for (const Json& rows : json["desc"].entries) {
    f.descriptors.emplace_back();
    for (const Json& words : rows.entries)
      f.descriptors.back().push_back(static_cast<uint64_t>(words[0].number) << 32 |
                                     static_cast<uint64_t>(words[1].number));
  }
  f.mn = layout_of(json["layout_bytes"]["mn"]);
  f.k = layout_of(json["layout_bytes"]["k"]);
  f.chunks = ints_of(modes[f.swizzle ? std::to_string(f.swizzle) : "none"]["chunks"]);
  if (json.fields.count("tma_box")) f.tma_box = ints_of(json["tma_box"]);
  f.fnv1a = json["fnv1a"].text;
  f.samples = json["samples"].entries;
  return f;
}

}  // namespace

Json read_json(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error("cannot read " + path);
  return Reader({std::istreambuf_iterator<char>(file), {}}).value();
}

uint32_t Form::address(int mn_index, int k_index) const {
  int at = static_cast<int>(base);
  for (const auto& [extent, bytes] : mn) {
    at += mn_index % extent * bytes;
    mn_index /= extent;
  }
  for (const auto& [extent, bytes] : k) {
    at += k_index % extent * bytes;
    k_index /= extent;
  }
  return static_cast<uint32_t>(at / 1024 * 1024 + chunks[static_cast<size_t>(at % 1024 / 16)] * 16 +
                               at % 16);
}

Tables::Tables(const std::string& folder)
    : fragments(read_json(folder + "/fragments.json")),
      swizzle(read_json(folder + "/swizzle.json")),
      descriptors(read_json(folder + "/descriptors.json")),
      rules(read_json(folder + "/rules.json")) {
  for (const Json& json : descriptors["forms"].entries) {
    Form f = form_of(json, swizzle["modes"]);
    forms[f.id] = f;
  }
}

const Form& Tables::form(const std::string& id) const {
  const auto found = forms.find(id);
  if (found == forms.end()) throw std::runtime_error("the tables have no form " + id);
  return found->second;
}

}  // namespace hopper

// Compares the layouts of the twin, of cuda/ptx.cuh and of the kernels with NVIDIA's:
//
//   hopper [-v] FOLDER
//
// FOLDER has the tables of test/golden/hopper.br. -v lists the number of comparisons.
#include "test/twin/hopper/checks.h"
#include "test/twin/simt.h"

namespace hopper {

void expect_descriptor(Group& group, const Form& form, uint64_t got, uint64_t want) {
  constexpr uint64_t field = 0x3FFF, leading = field << 16, stride = field << 32;
  uint64_t matters = ~uint64_t{0};
  if (!form.leading_matters) matters &= ~leading;
  if (!form.stride_matters) matters &= ~stride;
  group.expect((got & matters) == (want & matters), "%s: %016llx, CuTe has %016llx",
               form.id.c_str(), static_cast<unsigned long long>(got),
               static_cast<unsigned long long>(want));
}

namespace {

// The tables themselves: the address formula against the hashes and samples.
void check_tables(const Tables& tables, Checks& checks) {
  Group &hashes = checks["tables: hashes"], &samples = checks["tables: samples"];
  for (const auto& [id, form] : tables.forms) {
    uint64_t hash = 14695981039346656037ull;
    for (int sub = 0; sub < static_cast<int>(form.descriptors.size()); ++sub)
      for (int k = 0; k < 16 * form.steps(); ++k)
        for (int mn = 0; mn < form.instruction_mn; ++mn) {
          const uint32_t address = form.address(sub * form.rows_apart() + mn, k);
          for (int byte = 0; byte < 4; ++byte)
            hash = (hash ^ (address >> 8 * byte & 255)) * 1099511628211ull;
        }
    char text[17];
    std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash));
    hashes.expect(form.fnv1a == text, "%s", id.c_str());
    for (const Json& sample : form.samples)
      samples.expect(static_cast<int>(form.address(sample[0], sample[1])) == sample[2], "%s",
                     id.c_str());
  }
}

}  // namespace
}  // namespace hopper

int main(int argc, char** argv) {
  const bool verbose = argc > 2 && std::string(argv[1]) == "-v";
  if (argc != 2 + verbose) {
    std::fprintf(stderr, "usage: hopper [-v] FOLDER\n");
    return 2;
  }
  const hopper::Tables tables(argv[1 + verbose]);
  hopper::Checks checks;
  hopper::check_tables(tables, checks);
  hopper::check_primitives(tables, checks);
  hopper::check_attention(tables, checks);
  hopper::check_gemm(tables, checks);
  hopper::check_mma_kernels(tables, checks);
  hopper::check_rules(tables, checks);
  return checks.report(verbose) ? 0 : 1;
}

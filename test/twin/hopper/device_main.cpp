// Compares what a Hopper device does with NVIDIA's tables: which byte it takes for each element of
// each operand.
//
//   device_hopper FOLDER
//
// FOLDER has the tables of test/golden/hopper.br.
#include "test/twin/hopper/checks.h"

int main(int argc, char** argv) try {
  if (argc != 2) {
    std::fprintf(stderr, "usage: device_hopper FOLDER\n");
    return 2;
  }
  const hopper::Tables tables(argv[1]);
  hopper::Checks checks;
  hopper::check_primitives(tables, checks);
  return checks.report(true) ? 0 : 1;
} catch (const std::exception& e) {
  std::fprintf(stderr, "%s\n", e.what());
  return 1;
}

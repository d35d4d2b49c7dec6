// Misaligned loads and stores of the kernels, which fault on a GPU and not on x86. The kernels are
// compiled with -fsanitize=alignment, whose checks call this function instead of libubsan's, so
// that the report is that of any other rule.
#include "test/twin/simt.h"

namespace {

// As the compiler passes it.
struct TypeMismatch {
  const char* file;
  uint32_t line, column;
  const void* type;
  unsigned char log_alignment, kind;
};

}  // namespace

extern "C" [[noreturn]] void __ubsan_handle_type_mismatch_v1_abort(const TypeMismatch* mismatch,
                                                                   const void* address) {
  const uintptr_t alignment = uintptr_t{1} << mismatch->log_alignment;
  // The asan variant checks for the first two as well.
  const std::string what = !address ? "an access through a null pointer"
                           : reinterpret_cast<uintptr_t>(address) % alignment == 0
                               ? "an access beyond its object"
                               : "an address is not " + std::to_string(alignment) + "-byte aligned";
  simt::fail(what, {mismatch->file, int(mismatch->line)});
}

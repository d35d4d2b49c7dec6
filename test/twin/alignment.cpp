// A load or store of the kernels whose address is not a multiple of its type's alignment, which
// faults on a GPU and goes unnoticed on x86. The kernels are compiled with -fsanitize=alignment,
// and its check calls this instead of libubsan, so that it is reported as any other rule is.
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
                                                                   const void*) {
  simt::fail("an address is not " + std::to_string(1 << mismatch->log_alignment) + "-byte aligned",
             {mismatch->file, int(mismatch->line)});
}

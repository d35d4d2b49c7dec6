// Fills the table of kernels (simd.h) of the instruction set that this file is compiled for.
#include "cpu/simd/simd.h"
#include "cpu/simd/vec.h"

namespace p2r::cpu::P2R_ISA {

#define KERNEL(result, name, parameters) result name parameters;
#include "cpu/simd/kernels.def"
#undef KERNEL

extern const Simd table;
#define P2R_STRING_(x) #x
#define P2R_STRING(x) P2R_STRING_(x)
const Simd table = {
    P2R_STRING(P2R_ISA),
#define KERNEL(result, name, parameters) &name,
#include "cpu/simd/kernels.def"
#undef KERNEL
};

}  // namespace p2r::cpu::P2R_ISA

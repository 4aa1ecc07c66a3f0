/* neon.h: the kernels of an op with NEON: BODY, the name of its file for one DTYPE, for each. */
#include "cpu/simd/isa.h"

#if defined(__aarch64__)
#define ISA neon
#include "cpu/simd/vectors_neon.h"

#include "cpu/simd/each_dtype.h"
#endif

/* neon.h: the kernels of an op with NEON: BODY, the name of its file for one DTYPE, for each. */
#include "isa.h"

#if defined(__aarch64__)
#define ISA neon
#include "simd_neon.h"

#include "each_dtype.h"
#endif

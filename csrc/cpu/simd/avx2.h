/* avx2.h: the kernels of an op with AVX2: BODY, the name of its file for one DTYPE, for each. */
#include "cpu/simd/isa.h"

#if defined(__x86_64__)
MV_TARGET_BEGIN("avx2,fma,f16c")

#define ISA avx2
#include "cpu/simd/vectors_avx2.h"

#include "cpu/simd/each_dtype.h"

MV_TARGET_END
#endif

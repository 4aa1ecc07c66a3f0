/* avx512.h: the kernels of an op with AVX-512: BODY, the name of its file for one DTYPE, for each. */
#include "cpu/simd/isa.h"

#if defined(__x86_64__)
MV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#define ISA avx512
#include "cpu/simd/vectors_avx512.h"

#include "cpu/simd/each_dtype.h"

MV_TARGET_END
#endif

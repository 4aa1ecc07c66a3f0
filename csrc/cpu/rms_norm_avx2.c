/* rms_norm_avx2.c: the norm ops with AVX2. */
#include "isa.h"

#if defined(__x86_64__)
MV_TARGET_BEGIN("avx2,fma,f16c")

#define ISA avx2
#include "simd_avx2.h"

#define DTYPE f32
#include "rms_norm_body.h"
#undef DTYPE

#define DTYPE f16
#include "rms_norm_body.h"
#undef DTYPE

#define DTYPE bf16
#include "rms_norm_body.h"
#undef DTYPE

MV_TARGET_END
#endif

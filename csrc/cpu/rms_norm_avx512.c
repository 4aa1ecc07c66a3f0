/* rms_norm_avx512.c: the norm ops with AVX-512. */
#include "isa.h"

#if defined(__x86_64__)
MV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#define ISA avx512
#include "simd_avx512.h"

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

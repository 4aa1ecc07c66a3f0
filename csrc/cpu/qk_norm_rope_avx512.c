/* qk_norm_rope_avx512.c: qk_norm_rope with AVX-512. */
#include "isa.h"

#if defined(__x86_64__)
MV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#define ISA avx512
#include "simd_avx512.h"

#include "tokens.h"

#define DTYPE f32
#include "qk_norm_rope_body.h"
#undef DTYPE

#define DTYPE f16
#include "qk_norm_rope_body.h"
#undef DTYPE

#define DTYPE bf16
#include "qk_norm_rope_body.h"
#undef DTYPE

MV_TARGET_END
#endif

/* qk_norm_rope_avx2.c: qk_norm_rope with AVX2. */
#include "isa.h"

#if defined(__x86_64__)
MV_TARGET_BEGIN("avx2,fma,f16c")

#define ISA avx2
#include "simd_avx2.h"

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

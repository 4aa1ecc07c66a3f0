/* act_and_mul_avx2.c: silu_and_mul and gelu_and_mul with AVX2. */
#include "isa.h"

#if defined(__x86_64__)
MV_TARGET_BEGIN("avx2,fma,f16c")

#define ISA avx2
#include "simd_avx2.h"

#include "activation.h"

#define DTYPE f32
#include "act_and_mul_body.h"
#undef DTYPE

#define DTYPE f16
#include "act_and_mul_body.h"
#undef DTYPE

#define DTYPE bf16
#include "act_and_mul_body.h"
#undef DTYPE

MV_TARGET_END
#endif

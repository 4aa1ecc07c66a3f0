/* decode_attention_avx2.c: decode_attention with AVX2. */
#include "isa.h"

#if defined(__x86_64__)
MV_TARGET_BEGIN("avx2,fma,f16c")

#define ISA avx2
#include "simd_avx2.h"

#include "attention.h"

#define DTYPE f32
#include "decode_attention_body.h"
#undef DTYPE

#define DTYPE f16
#include "decode_attention_body.h"
#undef DTYPE

#define DTYPE bf16
#include "decode_attention_body.h"
#undef DTYPE

MV_TARGET_END
#endif

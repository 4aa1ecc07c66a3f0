/* decode_attention_avx512.c: decode_attention with AVX-512. */
#include "isa.h"

#if defined(__x86_64__)
MV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#define ISA avx512
#include "simd_avx512.h"

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

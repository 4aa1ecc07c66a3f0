/* rms_norm_qkv_avx512.c: rms_norm_qkv with AVX-512. */
#include "outputs.h"

#if defined(__x86_64__)
MV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#define ISA avx512
#include "simd_avx512.h"

#define DTYPE f32
#include "unit_f32.h"

#include "rms_norm_qkv_decode_body.h"
#include "rms_norm_qkv_prefill_body.h"
#undef DTYPE

#define DTYPE f16
#include "unit_f32.h"

#include "rms_norm_qkv_decode_body.h"
#include "rms_norm_qkv_prefill_body.h"
#undef DTYPE

#define DTYPE bf16
#include "unit_f32.h"

#include "rms_norm_qkv_decode_body.h"
#include "rms_norm_qkv_prefill_body.h"
#undef DTYPE

MV_TARGET_END
#endif

/* rms_norm_qkv_avx512bf16.c: rms_norm_qkv with AVX-512 and its bfloat16 products. */
#include "outputs.h"

#if defined(__x86_64__)
mv_kernel mv_rms_norm_qkv_bf16_decode_avx512, mv_rms_norm_qkv_bf16_prefill_avx512;

MV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")

#define ISA avx512bf16
#include "simd_avx512.h"

#define DTYPE bf16
#include "unit_bf16.h"

#include "rms_norm_qkv_decode_body.h"
#include "rms_norm_qkv_prefill_body.h"
#undef DTYPE

MV_TARGET_END
#endif

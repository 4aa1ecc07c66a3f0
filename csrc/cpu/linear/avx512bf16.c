/* avx512bf16.c: the linear ops with AVX-512 and its bfloat16 products. */
#include "cpu/linear/outputs.h"

#if defined(__x86_64__)
mv_kernel mv_linear_bf16_decode_avx512, mv_linear_bf16_prefill_avx512;

MV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")

#define ISA avx512bf16
#include "cpu/simd/vectors_avx512.h"

#define DTYPE bf16
#include "cpu/linear/unit_bf16.h"

#include "cpu/linear/decode_body.h"
#include "cpu/linear/prefill_body.h"
#undef DTYPE

MV_TARGET_END
#endif

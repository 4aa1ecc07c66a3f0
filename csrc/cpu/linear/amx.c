/* amx.c: the linear ops of many tokens with AMX, in bfloat16. */
#include "cpu/linear/outputs.h"

#if defined(__x86_64__)
mv_kernel mv_linear_bf16_prefill_avx512, mv_linear_bf16_prefill_avx512bf16;

MV_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")

#define ISA amx
#include "cpu/simd/vectors_avx512.h"

#define DTYPE bf16
#include "cpu/linear/unit_bf16.h"

#define TILES_OF_AMX
#define TILE_OUTPUTS 32
#define GROUP_VECTORS 1
#include "cpu/linear/prefill_body.h"
#undef DTYPE

MV_TARGET_END
#endif

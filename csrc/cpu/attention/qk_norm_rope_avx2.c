/* qk_norm_rope_avx2.c: qk_norm_rope with AVX2. */
#define BODY "cpu/attention/qk_norm_rope_body.h"
#include "cpu/simd/avx2.h"

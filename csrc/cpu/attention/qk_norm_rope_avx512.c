/* qk_norm_rope_avx512.c: qk_norm_rope with AVX-512. */
#define BODY "cpu/attention/qk_norm_rope_body.h"
#include "cpu/simd/avx512.h"

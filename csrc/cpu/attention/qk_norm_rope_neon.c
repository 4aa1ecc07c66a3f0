/* qk_norm_rope_neon.c: qk_norm_rope with NEON. */
#define BODY "cpu/attention/qk_norm_rope_body.h"
#include "cpu/simd/neon.h"

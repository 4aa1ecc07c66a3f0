/* qk_norm_rope_avx2.c: qk_norm_rope with AVX2. */
#define BODY "qk_norm_rope_body.h"
#include "avx2.h"

/* qk_norm_rope_avx512.c: qk_norm_rope with AVX-512. */
#define BODY "qk_norm_rope_body.h"
#include "avx512.h"

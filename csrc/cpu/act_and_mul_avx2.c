/* act_and_mul_avx2.c: silu_and_mul and gelu_and_mul with AVX2. */
#define BODY "act_and_mul_body.h"
#include "avx2.h"

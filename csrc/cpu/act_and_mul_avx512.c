/* act_and_mul_avx512.c: silu_and_mul and gelu_and_mul with AVX-512. */
#define BODY "act_and_mul_body.h"
#include "avx512.h"

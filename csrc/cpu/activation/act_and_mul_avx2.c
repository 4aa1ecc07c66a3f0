/* act_and_mul_avx2.c: silu_and_mul and gelu_and_mul with AVX2. */
#define BODY "cpu/activation/act_and_mul_body.h"
#include "cpu/simd/avx2.h"

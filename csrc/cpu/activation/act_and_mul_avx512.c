/* act_and_mul_avx512.c: silu_and_mul and gelu_and_mul with AVX-512. */
#define BODY "cpu/activation/act_and_mul_body.h"
#include "cpu/simd/avx512.h"

/* act_and_mul_neon.c: silu_and_mul and gelu_and_mul with NEON. */
#define BODY "cpu/activation/act_and_mul_body.h"
#include "cpu/simd/neon.h"

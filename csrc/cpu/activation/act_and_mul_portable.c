/* act_and_mul_portable.c: silu_and_mul and gelu_and_mul anywhere. */
#define BODY "cpu/activation/act_and_mul_body.h"
#include "cpu/simd/portable.h"

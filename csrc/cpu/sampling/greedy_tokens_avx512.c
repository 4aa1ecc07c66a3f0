/* greedy_tokens_avx512.c: greedy_tokens with AVX-512. */
#define BODY "cpu/sampling/greedy_tokens_body.h"
#include "cpu/simd/avx512.h"

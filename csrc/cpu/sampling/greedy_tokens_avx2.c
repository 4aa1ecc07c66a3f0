/* greedy_tokens_avx2.c: greedy_tokens with AVX2. */
#define BODY "cpu/sampling/greedy_tokens_body.h"
#include "cpu/simd/avx2.h"

/* greedy_tokens_neon.c: greedy_tokens with NEON. */
#define BODY "cpu/sampling/greedy_tokens_body.h"
#include "cpu/simd/neon.h"

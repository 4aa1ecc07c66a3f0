/* greedy_tokens_portable.c: greedy_tokens anywhere. */
#define BODY "cpu/sampling/greedy_tokens_body.h"
#include "cpu/simd/portable.h"

/* decode_attention_avx2.c: decode_attention with AVX2. */
#define BODY "cpu/attention/decode_attention_body.h"
#include "cpu/simd/avx2.h"

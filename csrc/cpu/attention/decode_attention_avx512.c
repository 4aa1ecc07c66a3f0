/* decode_attention_avx512.c: decode_attention with AVX-512. */
#define BODY "cpu/attention/decode_attention_body.h"
#include "cpu/simd/avx512.h"

/* decode_attention_neon.c: decode_attention with NEON. */
#define BODY "cpu/attention/decode_attention_body.h"
#include "cpu/simd/neon.h"

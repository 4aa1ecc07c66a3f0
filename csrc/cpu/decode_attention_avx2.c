/* decode_attention_avx2.c: decode_attention with AVX2. */
#define BODY "decode_attention_body.h"
#include "avx2.h"

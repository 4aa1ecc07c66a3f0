/* decode_attention_avx512.c: decode_attention with AVX-512. */
#define BODY "decode_attention_body.h"
#include "avx512.h"

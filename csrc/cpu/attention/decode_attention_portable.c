/* decode_attention_portable.c: decode_attention anywhere. */
#define BODY "cpu/attention/decode_attention_body.h"
#include "cpu/simd/portable.h"

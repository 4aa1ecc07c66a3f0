/* decode_attention_neon.c: decode_attention with NEON. */
#define BODY "decode_attention_body.h"
#include "neon.h"

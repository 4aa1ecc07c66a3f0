/* decode_attention_portable.c: decode_attention anywhere. */
#define BODY "decode_attention_body.h"
#include "portable.h"

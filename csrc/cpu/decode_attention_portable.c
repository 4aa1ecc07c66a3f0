/* decode_attention_portable.c: decode_attention anywhere. */
#include "isa.h"

#define ISA portable
#include "simd_portable.h"

#include "attention.h"

#define DTYPE f32
#include "decode_attention_body.h"
#undef DTYPE

#define DTYPE f16
#include "decode_attention_body.h"
#undef DTYPE

#define DTYPE bf16
#include "decode_attention_body.h"
#undef DTYPE

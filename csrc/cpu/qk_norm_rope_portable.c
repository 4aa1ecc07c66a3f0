/* qk_norm_rope_portable.c: qk_norm_rope anywhere. */
#include "isa.h"

#define ISA portable
#include "simd_portable.h"

#include "tokens.h"

#define DTYPE f32
#include "qk_norm_rope_body.h"
#undef DTYPE

#define DTYPE f16
#include "qk_norm_rope_body.h"
#undef DTYPE

#define DTYPE bf16
#include "qk_norm_rope_body.h"
#undef DTYPE

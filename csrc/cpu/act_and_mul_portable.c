/* act_and_mul_portable.c: silu_and_mul and gelu_and_mul anywhere. */
#include "isa.h"

#define ISA portable
#include "simd_portable.h"

#include "activation.h"

#define DTYPE f32
#include "act_and_mul_body.h"
#undef DTYPE

#define DTYPE f16
#include "act_and_mul_body.h"
#undef DTYPE

#define DTYPE bf16
#include "act_and_mul_body.h"
#undef DTYPE

/* rms_norm_portable.c: the norm ops anywhere. */
#include "isa.h"

#define ISA portable
#include "simd_portable.h"

#define DTYPE f32
#include "rms_norm_body.h"
#undef DTYPE

#define DTYPE f16
#include "rms_norm_body.h"
#undef DTYPE

#define DTYPE bf16
#include "rms_norm_body.h"
#undef DTYPE

/* rms_norm_qkv_portable.c: rms_norm_qkv anywhere. */
#include "outputs.h"

#define ISA portable
#include "simd_portable.h"

#define DTYPE f32
#include "unit_f32.h"

#include "rms_norm_qkv_decode_body.h"
#include "rms_norm_qkv_prefill_body.h"
#undef DTYPE

#define DTYPE f16
#include "unit_f32.h"

#include "rms_norm_qkv_decode_body.h"
#include "rms_norm_qkv_prefill_body.h"
#undef DTYPE

#define DTYPE bf16
#include "unit_f32.h"

#include "rms_norm_qkv_decode_body.h"
#include "rms_norm_qkv_prefill_body.h"
#undef DTYPE

/* rms_norm_qkv_portable.c: rms_norm_qkv anywhere. */
#include "outputs.h"

#define ISA portable
#include "simd_portable.h"

#define DTYPE f32
#include "norm_row.h"
#include "unit_f32.h"
#include "tile.h"
#include "rms_norm_qkv_prefill_body.h"
#include "rms_norm_qkv_decode_body.h"
#undef DTYPE

#define DTYPE f16
#include "norm_row.h"
#include "unit_f32.h"
#include "tile.h"
#include "rms_norm_qkv_prefill_body.h"
#include "rms_norm_qkv_decode_body.h"
#undef DTYPE

#define DTYPE bf16
#include "norm_row.h"
#include "unit_f32.h"
#include "tile.h"
#include "rms_norm_qkv_prefill_body.h"
#include "rms_norm_qkv_decode_body.h"
#undef DTYPE

/* rms_norm_qkv_body.h: rms_norm_qkv of few tokens and of many, in products of float32. */
#include "outputs.h"
#include "unit_f32.h"

#include "rms_norm_qkv_decode_body.h"
#include "rms_norm_qkv_prefill_body.h"

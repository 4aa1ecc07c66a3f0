/* rms_norm_qkv_neon.c: rms_norm_qkv with NEON. */
#define BODY "rms_norm_qkv_body.h"
#include "neon.h"

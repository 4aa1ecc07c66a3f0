/* rms_norm_qkv_avx2.c: rms_norm_qkv with AVX2. */
#define BODY "rms_norm_qkv_body.h"
#include "avx2.h"

/* rms_norm_qkv_avx512.c: rms_norm_qkv with AVX-512. */
#define BODY "rms_norm_qkv_body.h"
#include "avx512.h"

/* rms_norm_avx512.c: the norm ops with AVX-512. */
#define BODY "cpu/norm/rms_norm_body.h"
#include "cpu/simd/avx512.h"

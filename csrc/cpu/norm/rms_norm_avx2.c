/* rms_norm_avx2.c: the norm ops with AVX2. */
#define BODY "cpu/norm/rms_norm_body.h"
#include "cpu/simd/avx2.h"

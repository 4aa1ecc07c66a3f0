/* rms_norm_avx512.c: the norm ops with AVX-512. */
#define BODY "rms_norm_body.h"
#include "avx512.h"

/* rms_norm_avx2.c: the norm ops with AVX2. */
#define BODY "rms_norm_body.h"
#include "avx2.h"

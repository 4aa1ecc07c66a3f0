/* rms_norm_neon.c: the norm ops with NEON. */
#define BODY "cpu/norm/rms_norm_body.h"
#include "cpu/simd/neon.h"

/* rms_norm_portable.c: the norm ops anywhere. */
#define BODY "cpu/norm/rms_norm_body.h"
#include "cpu/simd/portable.h"

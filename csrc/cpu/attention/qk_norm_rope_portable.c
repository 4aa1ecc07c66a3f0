/* qk_norm_rope_portable.c: qk_norm_rope anywhere. */
#define BODY "cpu/attention/qk_norm_rope_body.h"
#include "cpu/simd/portable.h"

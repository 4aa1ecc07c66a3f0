/* qk_norm_rope_neon.c: qk_norm_rope with NEON. */
#define BODY "qk_norm_rope_body.h"
#include "neon.h"

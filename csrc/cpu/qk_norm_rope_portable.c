/* qk_norm_rope_portable.c: qk_norm_rope anywhere. */
#define BODY "qk_norm_rope_body.h"
#include "portable.h"

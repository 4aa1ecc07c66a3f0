/* act_and_mul_neon.c: silu_and_mul and gelu_and_mul with NEON. */
#define BODY "act_and_mul_body.h"
#include "neon.h"

/* act_and_mul_portable.c: silu_and_mul and gelu_and_mul anywhere. */
#define BODY "act_and_mul_body.h"
#include "portable.h"

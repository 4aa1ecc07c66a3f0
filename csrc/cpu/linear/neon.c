/* neon.c: the linear ops with NEON. */
#define BODY "cpu/linear/body.h"
#include "cpu/simd/neon.h"

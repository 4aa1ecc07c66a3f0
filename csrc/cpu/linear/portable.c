/* portable.c: the linear ops anywhere. */
#define BODY "cpu/linear/body.h"
#include "cpu/simd/portable.h"

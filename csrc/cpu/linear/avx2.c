/* avx2.c: the linear ops with AVX2. */
#define BODY "cpu/linear/body.h"
#include "cpu/simd/avx2.h"

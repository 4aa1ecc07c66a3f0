/* avx512.c: the linear ops with AVX-512. */
#define BODY "cpu/linear/body.h"
#include "cpu/simd/avx512.h"

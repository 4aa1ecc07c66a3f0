/* portable.h: the kernels of an op anywhere: BODY, the name of its file for one DTYPE, for each. */
#include "cpu/simd/isa.h"

#define ISA portable
#include "cpu/simd/vectors_portable.h"

#include "cpu/simd/each_dtype.h"

/* portable.h: the kernels of an op anywhere: BODY, the name of its file for one DTYPE, for each. */
#include "isa.h"

#define ISA portable
#include "simd_portable.h"

#include "each_dtype.h"

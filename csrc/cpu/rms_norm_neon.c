/* rms_norm_neon.c: the norm ops with NEON. */
#define BODY "rms_norm_body.h"
#include "neon.h"

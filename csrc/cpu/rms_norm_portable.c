/* rms_norm_portable.c: the norm ops anywhere. */
#define BODY "rms_norm_body.h"
#include "portable.h"

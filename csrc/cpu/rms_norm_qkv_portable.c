/* rms_norm_qkv_portable.c: rms_norm_qkv anywhere. */
#define BODY "rms_norm_qkv_body.h"
#include "portable.h"

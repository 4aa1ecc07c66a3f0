/* body.h: the linear ops of few tokens and of many, in products of float32. */
#include "cpu/linear/outputs.h"
#include "cpu/linear/unit_f32.h"

#include "cpu/linear/decode_body.h"
#include "cpu/linear/prefill_body.h"

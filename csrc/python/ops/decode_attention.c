/* decode_attention.c: one new token per sequence against its cache. */
#include "../base/refusals.h"
#include "../base/steps.h"
#include "../convert/results.h"
#include "ops.h"
#include "run.h"

#define ATTENTION(field, kind, role)                                                                                   \
    { #field, &kind, role, offsetof(mv_decode_attention_args, field) }

static const parameter decode_attention_parameters[] = {
    ATTENTION(q, tensor_value, ROWS),
    ATTENTION(k, tensor_value, ROWS),
    ATTENTION(v, tensor_value, ROWS),
    ATTENTION(key_cache, tensor_value, IN_PLACE),
    ATTENTION(value_cache, tensor_value, IN_PLACE),
    ATTENTION(positions, integers_value, ROWS),
    ATTENTION(cos, optional_tensor_value, ROWS),
    ATTENTION(sin, optional_tensor_value, ROWS),
    ATTENTION(q_norm_weight, optional_tensor_value, WEIGHT),
    ATTENTION(k_norm_weight, optional_tensor_value, WEIGHT),
    ATTENTION(eps, number_value, OPTION),
    ATTENTION(weight_offset, number_value, OPTION),
    ATTENTION(interleaved, flag_value, OPTION),
    ATTENTION(block_table, optional_integers_value, ROWS),
    ATTENTION(cache_layout, cache_layout_value, OPTION),
    ATTENTION(ring, flag_value, OPTION),
    ATTENTION(starts, optional_integers_value, ROWS),
    ATTENTION(scale, optional_number_value, OPTION),
    ATTENTION(window, optional_integer_value, OPTION),
    ATTENTION(soft_cap, optional_number_value, OPTION),
    ATTENTION(out, optional_tensor_value, OUTPUT),
    ATTENTION(rounding, rounding_value, OPTION),
    ATTENTION(batch_invariant, flag_value, OPTION),
    ATTENTION(static_weights, flag_value, OPTION),
    ATTENTION(static_rows, flag_value, OPTION),
    KERNEL_PARAMETER(mv_decode_attention_args),
};
static const mv_decode_attention_args decode_attention_defaults = {.call.op = "decode_attention", .eps = 1e-6};
SIGNATURE(decode_attention, SIGNATURE_decode_attention, "decode_attention", .required = 6, .positional = 6,
          .defaults = &decode_attention_defaults);

static PyObject *run_decode_attention(call *c, mv_decode_attention_args *a) {
    mv_plan plan;
    mv_error error;
    a->call.stream = c->stream;
    if (!check_status(mv_decode_attention(a, &plan, &error), &error)) return NULL;
    end_step(c, STEP_PLAN);
    if (!RUN_PLAN(c, &plan, &a->q, &a->out) || !note_written(c, &a->key_cache) || !note_written(c, &a->value_cache))
        return NULL;
    return returned(c, &a->out, &a->q);
}
FACE(decode_attention, mv_decode_attention_args)

/* qk_norm_rope.c: the norm and the rotary embedding of the heads of q and k, and the cache that k and v join. */
#include "../base/refusals.h"
#include "../base/steps.h"
#include "../convert/results.h"
#include "ops.h"
#include "run.h"

#define QK(field, kind, role)                                                                                          \
    { #field, &kind, role, offsetof(mv_qk_norm_rope_args, field) }

static const parameter qk_norm_rope_parameters[] = {
    QK(q, tensor_value, ROWS),
    QK(k, tensor_value, ROWS),
    QK(cos, optional_tensor_value, ROWS),
    QK(sin, optional_tensor_value, ROWS),
    QK(q_norm_weight, optional_tensor_value, WEIGHT),
    QK(k_norm_weight, optional_tensor_value, WEIGHT),
    QK(eps, number_value, OPTION),
    QK(weight_offset, number_value, OPTION),
    QK(interleaved, flag_value, OPTION),
    QK(rounding, rounding_value, OPTION),
    QK(out_q, optional_tensor_value, OUTPUT),
    QK(out_k, optional_tensor_value, OUTPUT),
    QK(v, optional_tensor_value, ROWS),
    QK(key_cache, optional_tensor_value, IN_PLACE),
    QK(value_cache, optional_tensor_value, IN_PLACE),
    QK(slots, optional_integers_value, ROWS),
    QK(cache_layout, cache_layout_value, OPTION),
    KERNEL_PARAMETER(mv_qk_norm_rope_args),
};
static const mv_qk_norm_rope_args qk_norm_rope_defaults = {.call.op = "qk_norm_rope", .eps = 1e-6};
SIGNATURE(qk_norm_rope, SIGNATURE_qk_norm_rope, "qk_norm_rope", .required = 2, .positional = 4,
          .defaults = &qk_norm_rope_defaults);

static PyObject *run_qk_norm_rope(call *c, mv_qk_norm_rope_args *a) {
    mv_plan plan;
    mv_error error;
    a->call.stream = c->stream;
    if (!check_status(mv_qk_norm_rope(a, &plan, &error), &error)) return NULL;
    end_step(c, STEP_PLAN);
    if (!RUN_PLAN(c, &plan, &a->q, &a->out_q, &a->out_k)) return NULL;
    if (is_given(&a->key_cache) && !(note_written(c, &a->key_cache) && note_written(c, &a->value_cache))) return NULL;
    return returned_pair(c, &a->out_q, &a->out_k, &a->q);
}
FACE(qk_norm_rope, mv_qk_norm_rope_args)

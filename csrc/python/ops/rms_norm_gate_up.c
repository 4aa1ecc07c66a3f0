/* rms_norm_gate_up.c: RMSNorm, the gate and up projections of an MLP, and what the activation makes of them. */
#include "../base/refusals.h"
#include "../base/steps.h"
#include "../convert/results.h"
#include "ops.h"
#include "run.h"

#define GATE_UP(field, kind, role)                                                                                     \
    { #field, &kind, role, offsetof(mv_rms_norm_gate_up_args, field) }

static const parameter rms_norm_gate_up_parameters[] = {
    GATE_UP(x, tensor_value, ROWS),
    GATE_UP(norm_weight, tensor_value, WEIGHT),
    GATE_UP(gate_up_weight, pair_value, WEIGHT),
    GATE_UP(eps, number_value, OPTION),
    GATE_UP(activation, activation_value, OPTION),
    GATE_UP(bias, optional_pair_value, WEIGHT),
    GATE_UP(residual, optional_tensor_value, ROWS),
    GATE_UP(out, optional_tensor_value, OUTPUT),
    GATE_UP(residual_out, optional_tensor_value, OUTPUT),
    GATE_UP(weight_layout, weight_layout_value, OPTION),
    GATE_UP(rounding, rounding_value, OPTION),
    GATE_UP(weight_offset, number_value, OPTION),
    GATE_UP(batch_invariant, flag_value, OPTION),
    GATE_UP(allow_tf32, flag_value, OPTION),
    GATE_UP(static_weights, flag_value, OPTION),
    KERNEL_PARAMETER(mv_rms_norm_gate_up_args),
};
static const mv_rms_norm_gate_up_args rms_norm_gate_up_defaults = {.call.op = "rms_norm_gate_up", .eps = 1e-6};
SIGNATURE(rms_norm_gate_up, SIGNATURE_rms_norm_gate_up, "rms_norm_gate_up", .required = 3, .positional = 4,
          .defaults = &rms_norm_gate_up_defaults);

/* out, or with a residual (out, residual_out) */
static PyObject *run_rms_norm_gate_up(call *c, mv_rms_norm_gate_up_args *a) {
    mv_plan plan;
    mv_error error;
    a->call.stream = c->stream;
    if (!check_status(mv_rms_norm_gate_up(a, &plan, &error), &error)) return NULL;
    end_step(c, STEP_PLAN);
    if (!RUN_PLAN(c, &plan, &a->x, &a->out, &a->residual_out)) return NULL;
    return is_given(&a->residual) ? returned_pair(c, &a->out, &a->residual_out, &a->x) : returned(c, &a->out, &a->x);
}
FACE(rms_norm_gate_up, mv_rms_norm_gate_up_args)

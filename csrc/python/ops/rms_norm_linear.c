/* rms_norm_linear.c: RMSNorm and a linear layer with any number of outputs. */
#include "../base/refusals.h"
#include "../base/steps.h"
#include "../convert/results.h"
#include "ops.h"
#include "run.h"

#define LINEAR(field, kind, role)                                                                                      \
    { #field, &kind, role, offsetof(mv_rms_norm_linear_args, field) }

static const parameter rms_norm_linear_parameters[] = {
    LINEAR(x, tensor_value, ROWS),
    LINEAR(norm_weight, tensor_value, WEIGHT),
    LINEAR(weight, tensor_value, WEIGHT),
    LINEAR(eps, number_value, OPTION),
    LINEAR(bias, optional_tensor_value, WEIGHT),
    LINEAR(residual, optional_tensor_value, ROWS),
    LINEAR(out, optional_tensor_value, OUTPUT),
    LINEAR(residual_out, optional_tensor_value, OUTPUT),
    LINEAR(weight_layout, weight_layout_value, OPTION),
    LINEAR(rounding, rounding_value, OPTION),
    LINEAR(weight_offset, number_value, OPTION),
    LINEAR(batch_invariant, flag_value, OPTION),
    LINEAR(allow_tf32, flag_value, OPTION),
    LINEAR(static_weights, flag_value, OPTION),
    KERNEL_PARAMETER(mv_rms_norm_linear_args),
};
static const mv_rms_norm_linear_args rms_norm_linear_defaults = {.call.op = "rms_norm_linear", .eps = 1e-6};
SIGNATURE(rms_norm_linear, SIGNATURE_rms_norm_linear, "rms_norm_linear", .required = 3, .positional = 4,
          .defaults = &rms_norm_linear_defaults);

/* out, or with a residual (out, residual_out) */
static PyObject *run_rms_norm_linear(call *c, mv_rms_norm_linear_args *a) {
    mv_plan plan;
    mv_error error;
    a->call.stream = c->stream;
    if (!check_status(mv_rms_norm_linear(a, &plan, &error), &error)) return NULL;
    end_step(c, STEP_PLAN);
    if (!RUN_PLAN(c, &plan, &a->x, &a->out, &a->residual_out)) return NULL;
    return is_given(&a->residual) ? returned_pair(c, &a->out, &a->residual_out, &a->x) : returned(c, &a->out, &a->x);
}
FACE(rms_norm_linear, mv_rms_norm_linear_args)

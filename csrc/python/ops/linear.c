/* linear.c: linear and linear_add. */
#include "../base/refusals.h"
#include "../base/steps.h"
#include "../convert/results.h"
#include "ops.h"
#include "run.h"

#define LINEAR(field, kind, role)                                                                                      \
    { #field, &kind, role, offsetof(mv_linear_args, field) }
#define LINEAR_OPTIONS                                                                                                 \
    LINEAR(weight_layout, weight_layout_value, OPTION), LINEAR(rounding, rounding_value, OPTION),                      \
        LINEAR(batch_invariant, flag_value, OPTION), LINEAR(allow_tf32, flag_value, OPTION),                           \
        LINEAR(static_weights, flag_value, OPTION), KERNEL_PARAMETER(mv_linear_args)

typedef mv_status linear_entry(const mv_linear_args *args, mv_plan *plan, mv_error *error);

/* Plans, makes the output that was not given, and runs. */
static PyObject *run_entry(call *c, mv_linear_args *a, linear_entry *entry) {
    mv_plan plan;
    mv_error error;
    a->call.stream = c->stream;
    if (!check_status(entry(a, &plan, &error), &error)) return NULL;
    end_step(c, STEP_PLAN);
    return RUN_PLAN(c, &plan, &a->x, &a->out) ? returned(c, &a->out, &a->x) : NULL;
}

static const parameter linear_parameters[] = {
    LINEAR(x, tensor_value, ROWS),
    LINEAR(weight, tensor_value, WEIGHT),
    LINEAR(bias, optional_tensor_value, WEIGHT),
    LINEAR(out, optional_tensor_value, OUTPUT),
    LINEAR_OPTIONS,
};
static const mv_linear_args linear_defaults = {.call.op = "linear"};
SIGNATURE(linear, SIGNATURE_linear, "linear", .required = 2, .positional = 2, .defaults = &linear_defaults);

static PyObject *run_linear(call *c, mv_linear_args *a) { return run_entry(c, a, mv_linear); }
FACE(linear, mv_linear_args)

static const parameter linear_add_parameters[] = {
    LINEAR(x, tensor_value, ROWS),
    LINEAR(weight, tensor_value, WEIGHT),
    LINEAR(residual, tensor_value, ROWS),
    LINEAR(bias, optional_tensor_value, WEIGHT),
    LINEAR(scale, number_value, OPTION),
    LINEAR(out, optional_tensor_value, OUTPUT),
    LINEAR_OPTIONS,
};
static const mv_linear_args linear_add_defaults = {.call.op = "linear_add", .scale = 1};
SIGNATURE(linear_add, SIGNATURE_linear_add, "linear_add", .required = 3, .positional = 3,
          .defaults = &linear_add_defaults);

static PyObject *run_linear_add(call *c, mv_linear_args *a) { return run_entry(c, a, mv_linear_add); }
FACE(linear_add, mv_linear_args)

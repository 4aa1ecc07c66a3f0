/* act_and_mul.c: silu_and_mul and gelu_and_mul. */
#include "../base/refusals.h"
#include "../base/steps.h"
#include "../convert/results.h"
#include "ops.h"
#include "run.h"

typedef mv_status act_and_mul_entry(const mv_act_and_mul_args *args, mv_plan *plan, mv_error *error);

static PyObject *run_act_and_mul(call *c, mv_act_and_mul_args *a, act_and_mul_entry *entry) {
    mv_plan plan;
    mv_error error;
    a->call.stream = c->stream;
    if (!check_status(entry(a, &plan, &error), &error)) return NULL;
    end_step(c, STEP_PLAN);
    return RUN_PLAN(c, &plan, &a->x, &a->out) ? returned(c, &a->out, &a->x) : NULL;
}

#define ACT_AND_MUL(field, kind, role)                                                                                 \
    { #field, &kind, role, offsetof(mv_act_and_mul_args, field) }

static const parameter silu_and_mul_parameters[] = {
    ACT_AND_MUL(x, tensor_value, ROWS),
    ACT_AND_MUL(out, optional_tensor_value, OUTPUT),
    ACT_AND_MUL(rounding, rounding_value, OPTION),
    KERNEL_PARAMETER(mv_act_and_mul_args),
};
static const mv_act_and_mul_args silu_and_mul_defaults = {.call.op = "silu_and_mul"};
SIGNATURE(silu_and_mul, SIGNATURE_silu_and_mul, "silu_and_mul", .required = 1, .positional = 1,
          .defaults = &silu_and_mul_defaults);

static PyObject *run_silu_and_mul(call *c, mv_act_and_mul_args *a) { return run_act_and_mul(c, a, mv_silu_and_mul); }
FACE(silu_and_mul, mv_act_and_mul_args)

static const parameter gelu_and_mul_parameters[] = {
    ACT_AND_MUL(x, tensor_value, ROWS),
    ACT_AND_MUL(approximate, approximate_value, OPTION),
    ACT_AND_MUL(out, optional_tensor_value, OUTPUT),
    ACT_AND_MUL(rounding, rounding_value, OPTION),
    KERNEL_PARAMETER(mv_act_and_mul_args),
};
static const mv_act_and_mul_args gelu_and_mul_defaults = {.call.op = "gelu_and_mul"};
SIGNATURE(gelu_and_mul, SIGNATURE_gelu_and_mul, "gelu_and_mul", .required = 1, .positional = 1,
          .defaults = &gelu_and_mul_defaults);

static PyObject *run_gelu_and_mul(call *c, mv_act_and_mul_args *a) { return run_act_and_mul(c, a, mv_gelu_and_mul); }
FACE(gelu_and_mul, mv_act_and_mul_args)

/* norms.c: rms_norm, add_rms_norm, fused_add_rms_norm, which is the latter in place, and norm_add. */
#include "../base/refusals.h"
#include "../base/steps.h"
#include "../convert/results.h"
#include "ops.h"
#include "run.h"

typedef mv_status norm_entry(const mv_rms_norm_args *args, mv_plan *plan, mv_error *error);

/* Plans, makes the outputs that were not given, and runs. */
static bool run_norm(call *c, mv_rms_norm_args *a, norm_entry *entry) {
    mv_plan plan;
    mv_error error;
    a->call.stream = c->stream;
    if (!check_status(entry(a, &plan, &error), &error)) return false;
    end_step(c, STEP_PLAN);
    return RUN_PLAN(c, &plan, &a->x, &a->out, &a->residual_out);
}

#define NORM(field, kind, role)                                                                                        \
    { #field, &kind, role, offsetof(mv_rms_norm_args, field) }

static const parameter rms_norm_parameters[] = {
    NORM(x, tensor_value, ROWS),
    NORM(weight, optional_tensor_value, WEIGHT),
    NORM(eps, number_value, OPTION),
    NORM(out, optional_tensor_value, OUTPUT),
    NORM(rounding, rounding_value, OPTION),
    NORM(weight_offset, number_value, OPTION),
    KERNEL_PARAMETER(mv_rms_norm_args),
};
static const mv_rms_norm_args rms_norm_defaults = {.call.op = "rms_norm", .eps = 1e-6};
SIGNATURE(rms_norm, SIGNATURE_rms_norm, "rms_norm", .required = 2, .positional = 3, .defaults = &rms_norm_defaults);

static PyObject *run_rms_norm(call *c, mv_rms_norm_args *a) {
    return run_norm(c, a, mv_rms_norm) ? returned(c, &a->out, &a->x) : NULL;
}
FACE(rms_norm, mv_rms_norm_args)

static const parameter add_rms_norm_parameters[] = {
    NORM(x, tensor_value, ROWS),
    NORM(residual, tensor_value, ROWS),
    NORM(weight, optional_tensor_value, WEIGHT),
    NORM(eps, number_value, OPTION),
    NORM(out, optional_tensor_value, OUTPUT),
    NORM(residual_out, optional_tensor_value, OUTPUT),
    NORM(rounding, rounding_value, OPTION),
    NORM(weight_offset, number_value, OPTION),
    KERNEL_PARAMETER(mv_rms_norm_args),
};
static const mv_rms_norm_args add_rms_norm_defaults = {.call.op = "add_rms_norm", .eps = 1e-6};
SIGNATURE(add_rms_norm, SIGNATURE_add_rms_norm, "add_rms_norm", .required = 3, .positional = 4,
          .defaults = &add_rms_norm_defaults);

static PyObject *run_add_rms_norm(call *c, mv_rms_norm_args *a) {
    return run_norm(c, a, mv_add_rms_norm) ? returned_pair(c, &a->out, &a->residual_out, &a->x) : NULL;
}
FACE(add_rms_norm, mv_rms_norm_args)

static const parameter fused_add_rms_norm_parameters[] = {
    NORM(x, tensor_value, IN_PLACE),
    NORM(residual, tensor_value, IN_PLACE),
    NORM(weight, optional_tensor_value, WEIGHT),
    NORM(eps, number_value, OPTION),
    NORM(rounding, rounding_value, OPTION),
    NORM(weight_offset, number_value, OPTION),
};
static const mv_rms_norm_args fused_add_rms_norm_defaults = {.call.op = "fused_add_rms_norm", .eps = 1e-6};
SIGNATURE(fused_add_rms_norm, SIGNATURE_fused_add_rms_norm, "fused_add_rms_norm", .required = 3, .positional = 4,
          .defaults = &fused_add_rms_norm_defaults);

/* In the op's own messages the outputs would have names that nobody gave. */
static bool check_writable(call *c, const mv_view *slot) {
    return !slot->read_only || refuse(c, tensor_of(c, slot), PyExc_ValueError,
                                      "is read-only, and this op works in place; pass a writable tensor, or use "
                                      "add_rms_norm");
}

static PyObject *run_fused_add_rms_norm(call *c, mv_rms_norm_args *a) {
    if (!check_writable(c, &a->x) || !check_writable(c, &a->residual)) return NULL;
    a->out = a->x;
    a->residual_out = a->residual;
    return run_norm(c, a, mv_add_rms_norm) ? returned_pair(c, &a->x, &a->residual, &a->x) : NULL;
}
FACE(fused_add_rms_norm, mv_rms_norm_args)

static const parameter norm_add_parameters[] = {
    NORM(x, tensor_value, ROWS),
    NORM(weight, optional_tensor_value, WEIGHT),
    NORM(residual, tensor_value, ROWS),
    NORM(eps, number_value, OPTION),
    NORM(out, optional_tensor_value, OUTPUT),
    NORM(rounding, rounding_value, OPTION),
    NORM(weight_offset, number_value, OPTION),
    KERNEL_PARAMETER(mv_rms_norm_args),
};
static const mv_rms_norm_args norm_add_defaults = {.call.op = "norm_add", .eps = 1e-6};
SIGNATURE(norm_add, SIGNATURE_norm_add, "norm_add", .required = 3, .positional = 4, .defaults = &norm_add_defaults);

static PyObject *run_norm_add(call *c, mv_rms_norm_args *a) {
    return run_norm(c, a, mv_norm_add) ? returned(c, &a->out, &a->x) : NULL;
}
FACE(norm_add, mv_rms_norm_args)

/* rms_norm_qkv.c: see rms_norm_qkv.h. */
#include "rms_norm_qkv.h"

#include "../base/refusals.h"
#include "../base/steps.h"
#include "../convert/results.h"
#include "ops.h"

static const parameter rms_norm_qkv_parameters[] = {
    QKV_PARAMETER(x, tensor_value, ROWS),
    QKV_WEIGHT_PARAMETERS,
    QKV_PARAMETER(residual, optional_tensor_value, ROWS),
    QKV_PARAMETER(head_dim, optional_integer_value, OPTION),
    QKV_PARAMETER(out, optional_tensor_value, OUTPUT),
    QKV_PARAMETER(residual_out, optional_tensor_value, OUTPUT),
    QKV_OPTION_PARAMETERS,
    QKV_PARAMETER(static_weights, flag_value, OPTION),
    KERNEL_PARAMETER(mv_rms_norm_qkv_args),
};
static const mv_rms_norm_qkv_args rms_norm_qkv_defaults = {.call.op = "rms_norm_qkv", .eps = 1e-6};
SIGNATURE(rms_norm_qkv, SIGNATURE_rms_norm_qkv, "rms_norm_qkv", .required = 5, .positional = 6,
          .defaults = &rms_norm_qkv_defaults);

/* (q, k, v), or with a residual (q, k, v, residual_out) */
static PyObject *returned_qkv(call *c, const mv_rms_norm_qkv_args *a, int64_t head_dim) {
    const head_counts counts = {{a->num_heads, a->num_kv_heads, a->num_kv_heads}, head_dim};
    PyObject *parts = returned_parts(c, &a->out, &a->x, &counts);
    if (!parts || !is_given(&a->residual)) return parts;
    PyObject *residual_out = returned(c, &a->residual_out, &a->x);
    PyObject *result = residual_out ? PyTuple_Pack(4, PyTuple_GetItem(parts, 0), PyTuple_GetItem(parts, 1),
                                                   PyTuple_GetItem(parts, 2), residual_out)
                                    : NULL;
    Py_XDECREF(residual_out);
    Py_DECREF(parts);
    return result;
}

/* out [..., qkv] itself, or with a residual (out, residual_out) */
static PyObject *returned_packed(call *c, const mv_rms_norm_qkv_args *a) {
    return is_given(&a->residual) ? returned_pair(c, &a->out, &a->residual_out, &a->x) : returned(c, &a->out, &a->x);
}

PyObject *run_qkv(call *c, mv_rms_norm_qkv_args *a, bool packed) {
    mv_plan plan;
    mv_error error;
    a->call.stream = c->stream;
    if (!check_status(mv_rms_norm_qkv(a, &plan, &error), &error)) return NULL;
    end_step(c, STEP_PLAN);
    if (!packed && !check_splittable(c, &a->out)) return NULL;
    const int64_t heads = a->num_heads + 2 * a->num_kv_heads, head_dim = plan.output[0].columns / heads;
    mv_view *const slots[] = {&a->out, &a->residual_out};
    if (!run_plan(c, &plan, &a->x, slots, packed ? 0 : 2, (const int64_t[]){heads, head_dim})) return NULL;
    return packed ? returned_packed(c, a) : returned_qkv(c, a, head_dim);
}

static PyObject *run_rms_norm_qkv(call *c, mv_rms_norm_qkv_args *a) { return run_qkv(c, a, false); }
FACE(rms_norm_qkv, mv_rms_norm_qkv_args)

/* For torch's registered op, whose outputs must not be views. */
PyObject *py_rms_norm_qkv_packed(PyObject *module, PyObject *const *given, Py_ssize_t count, PyObject *names) {
    mv_rms_norm_qkv_args a = rms_norm_qkv_defaults;
    call c;
    begin_call(&c, module, a.call.op);
    c.torch_function = "rms_norm_qkv_packed";
    if (parse(&c, &rms_norm_qkv_signature, &a, given, count, names)) c.result = run_qkv(&c, &a, true);
    end_call(&c);
    return c.result;
}

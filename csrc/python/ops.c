/* ops.c: one function per op: its table, the args struct, outputs where none were given, the call, the result. */
#include "ops.h"

#include "buffers.h"
#include "info.h"
#include "layer.h"
#include "results.h"
#include "steps.h"

/* Runs a plan; its outputs are there. */
static bool run(call *c, mv_plan *plan, const mv_view *x, const mv_view *out, const mv_view *residual_out) {
    mv_memory memory = {.out = out->data, .residual_out = residual_out->data};
    mv_error error;
    mv_status status;
    if (!provide_workspace(c, x, plan->workspace_bytes, &memory.workspace)) return false;
    end_step(c, STEP_ALLOCATE);
    if (plan->is_long) {
        Py_BEGIN_ALLOW_THREADS status = mv_run(plan, &memory, &error);
        Py_END_ALLOW_THREADS
    } else {
        status = mv_run(plan, &memory, &error);
    }
    end_step(c, STEP_RUN);
    return check_status(status, &error) && settle(c);
}

/* ---- the norms -------------------------------------------------------------------------------------------------- */

typedef mv_status norm_entry(const mv_rms_norm_args *args, mv_plan *plan, mv_error *error);

/* Plans, makes the outputs that were not given, and runs. */
static bool run_norm(call *c, mv_rms_norm_args *a, norm_entry *entry) {
    mv_plan plan;
    mv_error error;
    a->call.stream = c->stream;
    if (!check_status(entry(a, &plan, &error), &error)) return false;
    end_step(c, STEP_PLAN);
    const int64_t hidden = hidden_of(&a->x);
    return provide(c, "out", &a->out, &a->x, 1, &hidden) &&
           (!is_given(&a->residual) || provide(c, "residual_out", &a->residual_out, &a->x, 1, &hidden)) &&
           run(c, &plan, &a->x, &a->out, &a->residual_out);
}

#define NORM(name, convert, field)                                                                                     \
    { name, convert, offsetof(mv_rms_norm_args, field) }

static const parameter rms_norm_parameters[] = {
    NORM("x", to_tensor, x),
    NORM("weight", to_optional_tensor, weight),
    NORM("eps", to_number, eps),
    NORM("out", to_optional_tensor, out),
    NORM("rounding", to_rounding, rounding),
    NORM("weight_offset", to_number, weight_offset),
    NORM("kernel", to_optional_text, call.kernel),
};
const signature rms_norm_signature = {"rms_norm", 0, 2, 3, LENGTH(rms_norm_parameters), rms_norm_parameters};

PyObject *py_rms_norm(PyObject *module, PyObject *const *given, Py_ssize_t count, PyObject *names) {
    mv_rms_norm_args a = {.call.op = "rms_norm", .eps = 1e-6};
    call c;
    begin_call(&c, module, a.call.op);
    if (parse(&c, &rms_norm_signature, &a, given, count, names) && run_norm(&c, &a, mv_rms_norm))
        c.result = returned(&c, &a.out, &a.x);
    end_call(&c);
    return c.result;
}

/* (out, residual_out) */
static PyObject *returned_pair(call *c, const mv_view *first, const mv_view *second, const mv_view *x) {
    PyObject *out = returned(c, first, x);
    PyObject *residual_out = out ? returned(c, second, x) : NULL;
    PyObject *pair = residual_out ? PyTuple_Pack(2, out, residual_out) : NULL;
    Py_XDECREF(residual_out);
    Py_XDECREF(out);
    return pair;
}

static const parameter add_rms_norm_parameters[] = {
    NORM("x", to_tensor, x),
    NORM("residual", to_tensor, residual),
    NORM("weight", to_optional_tensor, weight),
    NORM("eps", to_number, eps),
    NORM("out", to_optional_tensor, out),
    NORM("residual_out", to_optional_tensor, residual_out),
    NORM("rounding", to_rounding, rounding),
    NORM("weight_offset", to_number, weight_offset),
    NORM("kernel", to_optional_text, call.kernel),
};
const signature add_rms_norm_signature = {"add_rms_norm",         1, 3, 4, LENGTH(add_rms_norm_parameters),
                                          add_rms_norm_parameters};

PyObject *py_add_rms_norm(PyObject *module, PyObject *const *given, Py_ssize_t count, PyObject *names) {
    mv_rms_norm_args a = {.call.op = "add_rms_norm", .eps = 1e-6};
    call c;
    begin_call(&c, module, a.call.op);
    if (parse(&c, &add_rms_norm_signature, &a, given, count, names) && run_norm(&c, &a, mv_add_rms_norm))
        c.result = returned_pair(&c, &a.out, &a.residual_out, &a.x);
    end_call(&c);
    return c.result;
}

static const parameter fused_add_rms_norm_parameters[] = {
    NORM("x", to_tensor, x),
    NORM("residual", to_tensor, residual),
    NORM("weight", to_optional_tensor, weight),
    NORM("eps", to_number, eps),
    NORM("rounding", to_rounding, rounding),
    NORM("weight_offset", to_number, weight_offset),
};
static const signature fused_add_rms_norm_signature = {
    "fused_add_rms_norm", 2, 3, 4, LENGTH(fused_add_rms_norm_parameters), fused_add_rms_norm_parameters};

/* In the op's own messages the outputs would have names that nobody gave. */
static bool check_writable(call *c, const mv_view *slot) {
    return !slot->read_only || refuse(c, tensor_of(c, slot), PyExc_ValueError,
                                      "is read-only, and this op works in place; pass a writable tensor, or use "
                                      "add_rms_norm");
}

PyObject *py_fused_add_rms_norm(PyObject *module, PyObject *const *given, Py_ssize_t count, PyObject *names) {
    mv_rms_norm_args a = {.call.op = "fused_add_rms_norm", .eps = 1e-6};
    call c;
    begin_call(&c, module, a.call.op);
    if (parse(&c, &fused_add_rms_norm_signature, &a, given, count, names) && check_writable(&c, &a.x) &&
        check_writable(&c, &a.residual)) {
        a.out = a.x;
        a.residual_out = a.residual;
        if (run_norm(&c, &a, mv_add_rms_norm)) c.result = returned_pair(&c, &a.x, &a.residual, &a.x);
    }
    end_call(&c);
    return c.result;
}

/* ---- rms_norm_qkv ----------------------------------------------------------------------------------------------- */

static const parameter rms_norm_qkv_parameters[] = {
    QKV_PARAMETER("x", to_tensor, x),
    QKV_WEIGHT_PARAMETERS,
    QKV_PARAMETER("residual", to_optional_tensor, residual),
    QKV_PARAMETER("head_dim", to_optional_integer, head_dim),
    QKV_PARAMETER("out", to_optional_tensor, out),
    QKV_PARAMETER("residual_out", to_optional_tensor, residual_out),
    QKV_OPTION_PARAMETERS,
    QKV_PARAMETER("static_weights", to_flag, static_weights),
    QKV_PARAMETER("kernel", to_optional_text, call.kernel),
};
const signature rms_norm_qkv_signature = {"rms_norm_qkv",         3, 5, 6, LENGTH(rms_norm_qkv_parameters),
                                          rms_norm_qkv_parameters};

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
    const int64_t hidden = hidden_of(&a->x), heads[2] = {plan.qkv / plan.head_dim, plan.head_dim};
    if (!provide(c, "out", &a->out, &a->x, packed ? 1 : 2, packed ? &plan.qkv : heads) ||
        (is_given(&a->residual) && !provide(c, "residual_out", &a->residual_out, &a->x, 1, &hidden)) ||
        !run(c, &plan, &a->x, &a->out, &a->residual_out))
        return NULL;
    return packed ? returned_packed(c, a) : returned_qkv(c, a, plan.head_dim);
}

/* torch_function: of minivllm.torch, for a call that is handed over. */
static PyObject *rms_norm_qkv(PyObject *module, const signature *s, const char *torch_function, PyObject *const *given,
                              Py_ssize_t count, PyObject *names, bool packed) {
    mv_rms_norm_qkv_args a = {.call.op = "rms_norm_qkv", .eps = 1e-6};
    call c;
    begin_call(&c, module, a.call.op);
    c.torch_function = torch_function;
    if (parse(&c, s, &a, given, count, names)) c.result = run_qkv(&c, &a, packed);
    end_call(&c);
    return c.result;
}

PyObject *py_rms_norm_qkv(PyObject *module, PyObject *const *given, Py_ssize_t count, PyObject *names) {
    return rms_norm_qkv(module, &rms_norm_qkv_signature, "rms_norm_qkv", given, count, names, false);
}

/* For torch's registered op, whose outputs must not be views. */
PyObject *py_rms_norm_qkv_packed(PyObject *module, PyObject *const *given, Py_ssize_t count, PyObject *names) {
    return rms_norm_qkv(module, &rms_norm_qkv_signature, "rms_norm_qkv_packed", given, count, names, true);
}

const signature *const all_signatures[] = {
    &rms_norm_signature,     &add_rms_norm_signature,    &fused_add_rms_norm_signature,
    &rms_norm_qkv_signature, &check_signature,           &held_signature,
    &call_signature,         &set_num_threads_signature, NULL};

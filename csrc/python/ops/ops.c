/* ops.c: what is an op's own: its table of parameters, its defaults, and run_<op>(), which plans, makes the outputs,
 * runs and gives back the result. The list of ops makes everything else. */
#include "ops.h"

#include <string.h>

#include "../base/refusals.h"
#include "../base/steps.h"
#include "../convert/buffers.h"
#include "../convert/results.h"

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

#define NORM(field, kind, role)                                                                                        \
    { #field, &kind, role, offsetof(mv_rms_norm_args, field) }
#define KERNEL(args)                                                                                                   \
    { "kernel", &optional_text_value, OPTION, offsetof(args, call.kernel) }

static const parameter rms_norm_parameters[] = {
    NORM(x, tensor_value, ROWS),
    NORM(weight, optional_tensor_value, WEIGHT),
    NORM(eps, number_value, OPTION),
    NORM(out, optional_tensor_value, OUTPUT),
    NORM(rounding, rounding_value, OPTION),
    NORM(weight_offset, number_value, OPTION),
    KERNEL(mv_rms_norm_args),
};
static const mv_rms_norm_args rms_norm_defaults = {.call.op = "rms_norm", .eps = 1e-6};
SIGNATURE(rms_norm, SIGNATURE_rms_norm, "rms_norm", .required = 2, .positional = 3, .defaults = &rms_norm_defaults);

static PyObject *run_rms_norm(call *c, mv_rms_norm_args *a) {
    return run_norm(c, a, mv_rms_norm) ? returned(c, &a->out, &a->x) : NULL;
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
    NORM(x, tensor_value, ROWS),
    NORM(residual, tensor_value, ROWS),
    NORM(weight, optional_tensor_value, WEIGHT),
    NORM(eps, number_value, OPTION),
    NORM(out, optional_tensor_value, OUTPUT),
    NORM(residual_out, optional_tensor_value, OUTPUT),
    NORM(rounding, rounding_value, OPTION),
    NORM(weight_offset, number_value, OPTION),
    KERNEL(mv_rms_norm_args),
};
static const mv_rms_norm_args add_rms_norm_defaults = {.call.op = "add_rms_norm", .eps = 1e-6};
SIGNATURE(add_rms_norm, SIGNATURE_add_rms_norm, "add_rms_norm", .required = 3, .positional = 4,
          .defaults = &add_rms_norm_defaults);

static PyObject *run_add_rms_norm(call *c, mv_rms_norm_args *a) {
    return run_norm(c, a, mv_add_rms_norm) ? returned_pair(c, &a->out, &a->residual_out, &a->x) : NULL;
}

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

/* ---- rms_norm_qkv ----------------------------------------------------------------------------------------------- */

static const parameter rms_norm_qkv_parameters[] = {
    QKV_PARAMETER(x, tensor_value, ROWS),
    QKV_WEIGHT_PARAMETERS,
    QKV_PARAMETER(residual, optional_tensor_value, ROWS),
    QKV_PARAMETER(head_dim, optional_integer_value, OPTION),
    QKV_PARAMETER(out, optional_tensor_value, OUTPUT),
    QKV_PARAMETER(residual_out, optional_tensor_value, OUTPUT),
    QKV_OPTION_PARAMETERS,
    QKV_PARAMETER(static_weights, flag_value, OPTION),
    KERNEL(mv_rms_norm_qkv_args),
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
    const int64_t hidden = hidden_of(&a->x), heads[2] = {plan.qkv / plan.head_dim, plan.head_dim};
    if (!provide(c, "out", &a->out, &a->x, packed ? 1 : 2, packed ? &plan.qkv : heads) ||
        (is_given(&a->residual) && !provide(c, "residual_out", &a->residual_out, &a->x, 1, &hidden)) ||
        !run(c, &plan, &a->x, &a->out, &a->residual_out))
        return NULL;
    return packed ? returned_packed(c, a) : returned_qkv(c, a, plan.head_dim);
}

static PyObject *run_rms_norm_qkv(call *c, mv_rms_norm_qkv_args *a) { return run_qkv(c, a, false); }

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

/* ---- all of them ------------------------------------------------------------------------------------------------ */

#define DEFINE_FACE(name, args)                                                                                        \
    PyObject *py_##name(PyObject *module, PyObject *const *given, Py_ssize_t count, PyObject *names) {                 \
        args a = name##_defaults;                                                                                      \
        call c;                                                                                                        \
        begin_call(&c, module, a.call.op);                                                                             \
        if (parse(&c, &name##_signature, &a, given, count, names)) c.result = run_##name(&c, &a);                      \
        end_call(&c);                                                                                                  \
        return c.result;                                                                                               \
    }
FACES(DEFINE_FACE)

#define DEFINE_PLAN(name, args)                                                                                        \
    _Static_assert(offsetof(args, call) == 0, "the args of " #name " begin with a call");                              \
    static mv_status plan_##name(const op_args *a, mv_plan *plan, mv_error *error) {                                   \
        return mv_##name(&a->name, plan, error);                                                                       \
    }
MV_OPS(DEFINE_PLAN)

#define ROW_OF(name, args) {#name, &name##_signature, plan_##name, sizeof(args)},
const op ops[OPS] = {MV_OPS(ROW_OF)};

/* Of weights that leave it open, the op accepts the one layout that they have. */
bool is_in_out(const op *o, const void *args) {
    const signature *s = o->arguments;
    int i = 0;
    while (i < s->count && s->parameters[i].kind != &weight_layout_value) i++;
    if (i == s->count) return false;
    op_args named;
    mv_plan plan;
    mv_error error;
    memcpy(&named, args, o->args_size);
    mv_weight_layout *layout = (mv_weight_layout *)(void *)((char *)&named + s->parameters[i].offset);
    if (*layout != MV_LAYOUT_AUTO) return *layout == MV_LAYOUT_IN_OUT;
    *layout = MV_LAYOUT_OUT_IN;
    return o->plan(&named, &plan, &error) != MV_OK;
}

#define DESCRIBE(name, args)                                                                                           \
    ok = ok && (parameters = described(&name##_signature)) && PyDict_SetItemString(all, #name, parameters) == 0;       \
    Py_CLEAR(parameters);

PyObject *py_ops(PyObject *module, PyObject *ignored) {
    (void)module, (void)ignored;
    PyObject *all = PyDict_New(), *parameters = NULL;
    bool ok = all != NULL;
    FACES(DESCRIBE)
    if (!ok) Py_CLEAR(all);
    return all;
}

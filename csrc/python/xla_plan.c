/* xla_plan.c: the ops as XLA gets them, and what JAX is told about a call while it is traced: see xla_ffi.h. */
#include "buffers.h"
#include "ops.h"
#include "xla_ffi.h"

/* ---- the ops ---------------------------------------------------------------------------------------------------- */

#define NORM(field) offsetof(op_args, norm.field)
#define QKV(field) offsetof(op_args, qkv.field)

static const attribute norm_attributes[] = {
    {"eps", NUMBER, NORM(eps)},
    {"weight_offset", NUMBER, NORM(weight_offset)},
    {"rounding", CHOICE, NORM(rounding)},
    {"kernel", TEXT, NORM(call.kernel)},
};
static const size_t norm_tensors[] = {NORM(x), NORM(residual), NORM(weight)};

static const attribute qkv_attributes[] = {
    {"eps", NUMBER, QKV(eps)},
    {"weight_offset", NUMBER, QKV(weight_offset)},
    {"rounding", CHOICE, QKV(rounding)},
    {"kernel", TEXT, QKV(call.kernel)},
    {"num_heads", INTEGER, QKV(num_heads)},
    {"num_kv_heads", INTEGER, QKV(num_kv_heads)},
    {"head_dim", INTEGER, QKV(head_dim)},
    {"weight_layout", CHOICE, QKV(weight_layout)},
    {"batch_invariant", FLAG, QKV(batch_invariant)},
    {"allow_tf32", FLAG, QKV(allow_tf32)},
    {"static_weights", FLAG, QKV(static_weights)},
};
static const size_t qkv_tensors[] = {
    QKV(x),       QKV(residual), QKV(norm_weight), QKV(qkv_weight[0]), QKV(qkv_weight[1]), QKV(qkv_weight[2]),
    QKV(bias[0]), QKV(bias[1]),  QKV(bias[2])};

static mv_status plan_rms_norm(const op_args *args, mv_plan *plan, mv_error *error) {
    return mv_rms_norm(&args->norm, plan, error);
}
static mv_status plan_add_rms_norm(const op_args *args, mv_plan *plan, mv_error *error) {
    return mv_add_rms_norm(&args->norm, plan, error);
}
static mv_status plan_rms_norm_qkv(const op_args *args, mv_plan *plan, mv_error *error) {
    return mv_rms_norm_qkv(&args->qkv, plan, error);
}

#define NORM_TABLES norm_attributes, norm_tensors, LENGTH(norm_attributes), LENGTH(norm_tensors)
#define QKV_TABLES qkv_attributes, qkv_tensors, LENGTH(qkv_attributes), LENGTH(qkv_tensors)

const xla_op xla_ops[XLA_OPS] = {
    [XLA_RMS_NORM] = {"rms_norm", &rms_norm_signature, plan_rms_norm, NORM_TABLES},
    [XLA_ADD_RMS_NORM] = {"add_rms_norm", &add_rms_norm_signature, plan_add_rms_norm, NORM_TABLES},
    [XLA_RMS_NORM_QKV] = {"rms_norm_qkv", &rms_norm_qkv_signature, plan_rms_norm_qkv, QKV_TABLES},
};

_Static_assert(NORM(call) == QKV(call) && NORM(x) == QKV(x) && NORM(residual) == QKV(residual), "a common beginning");

/* ---- while JAX traces ------------------------------------------------------------------------------------------- */

static PyObject *attribute_value(const attribute *a, const op_args *args) {
    const void *field = (const char *)args + a->offset;
    switch (a->kind) {
    case NUMBER: return PyFloat_FromDouble(*(const double *)field);
    case INTEGER: return PyLong_FromLongLong(*(const int64_t *)field);
    case CHOICE: return PyLong_FromLong(*(const int *)field);
    case FLAG: return PyBool_FromLong(*(const bool *)field);
    default: {
        const char *text = *(const char *const *)field;
        return PyUnicode_FromString(text ? text : "");
    }
    }
}

static bool put(PyObject *dict, const char *name, PyObject *value) {
    const bool ok = value && PyDict_SetItemString(dict, name, value) == 0;
    Py_XDECREF(value);
    return ok;
}

static PyObject *attributes_of(const xla_op *o, op_args *args) {
    int64_t given = 0;
    for (int i = 0; i < o->tensor_count; i++)
        if (xla_view(o, args, i)->shape) given |= (int64_t)1 << i;
    PyObject *dict = PyDict_New();
    bool ok = dict && put(dict, XLA_GIVEN, PyLong_FromLongLong(given));
    for (int i = 0; ok && i < o->attribute_count; i++)
        ok = put(dict, o->attributes[i].name, attribute_value(&o->attributes[i], args));
    if (!ok) Py_CLEAR(dict);
    return dict;
}

static const xla_op *op_named(PyObject *name) {
    for (int i = 0; i < XLA_OPS; i++)
        if (PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, xla_ops[i].name) == 0) return &xla_ops[i];
    PyErr_Format(PyExc_ValueError, "_xla_plan: there is no op %R", name);
    return NULL;
}

/* The arrays are NumPy's, of the right shapes and dtypes, and stand for JAX's on that device. */
PyObject *py_xla_plan(PyObject *module, PyObject *const *given, Py_ssize_t count, PyObject *names) {
    if (count < 2) return PyErr_Format(PyExc_TypeError, "_xla_plan: takes an op, a GPU or -1, and the op's arguments");
    const xla_op *o = op_named(given[0]);
    if (!o) return NULL;
    const long gpu = PyLong_AsLong(given[1]);
    if (gpu == -1 && PyErr_Occurred()) return NULL;
    const mv_device device = {gpu < 0 ? MV_CPU : MV_CUDA, gpu < 0 ? 0 : (int32_t)gpu};
    op_args args = {0};
    mv_plan plan;
    mv_error error;
    PyObject *result = NULL;
    call c;
    args.norm.call.op = o->name;
    begin_call(&c, module, o->name);
    c.may_hand_over = false; /* to torch, which would run the op */
    if (parse(&c, o->arguments, &args, given + 2, count - 2, names)) {
        for (int i = 0; i < c.count; i++) c.tensors[i].slot->device = device;
        if (check_status(o->plan(&args, &plan, &error), &error)) {
            result = Py_BuildValue("(LLnN)", (long long)plan.qkv, (long long)plan.head_dim,
                                   (Py_ssize_t)xla_scratch_bytes(&plan), attributes_of(o, &args));
        }
    }
    end_call(&c);
    return result;
}

/* layer.c: see layer.h. A layer is an instance of a Python class that holds the weights; a call reads its attributes
 * here. */
#include "layer.h"

#include <string.h>
#include <structmember.h>

#include "../base/refusals.h"
#include "../frameworks/torch.h"
#include "../frameworks/torch_c.h"
#include "docstrings.h"
#include "rms_norm_qkv.h"

/* ---- making one ------------------------------------------------------------------------------------------------- */

/* The arguments of a layer's calls. by_counters: static_weights is None, torch's version counters vouch. */
typedef struct {
    mv_rms_norm_qkv_args qkv;
    bool by_counters;
} layer_args;

static bool to_vouching(call *c, const parameter *p, PyObject *value, void *target) {
    layer_args *a = (layer_args *)((char *)target - offsetof(layer_args, qkv.static_weights));
    a->by_counters = value == Py_None;
    return a->by_counters || flag_value.convert(c, p, value, target);
}
static const value_kind vouching_value = {FLAG, true, to_vouching, NULL};

static const parameter layer_check_parameters[] = {
    QKV_WEIGHT_PARAMETERS,
    QKV_PARAMETER(head_dim, optional_integer_value, OPTION),
    QKV_OPTION_PARAMETERS,
    QKV_PARAMETER(static_weights, vouching_value, OPTION),
};
SIGNATURE(layer_check, SIGNATURE_LAYER_CHECK, "FusedRMSNormQKV", .required = 4, .positional = 5);

/* Every argument that is no tensor, as the bytes of the end of the args struct: a layer's are read once. */
enum { NUMBERS_AT = offsetof(layer_args, qkv.num_heads), NUMBERS_SIZE = sizeof(layer_args) - NUMBERS_AT };

/* Everything that can be known before there is an x: (hidden, qkv, head_dim, in_out, numbers). Parameters are not read,
 * so gradients do not matter. Any weight that is not float32 tells x's dtype. */
PyObject *py_check_rms_norm_qkv(PyObject *module, PyObject *const *given, Py_ssize_t count, PyObject *names) {
    layer_args a;
    memset(&a, 0, sizeof a); /* all bytes are handed out */
    mv_rms_norm_qkv_args *qkv = &a.qkv;
    memcpy(qkv, rms_norm_qkv_signature.defaults, sizeof *qkv);
    qkv->call.op = layer_check_signature.op;
    mv_plan plan;
    mv_error error;
    PyObject *result = NULL;
    call c;
    begin_call(&c, module, qkv->call.op);
    c.may_hand_over = false;
    if (parse(&c, &layer_check_signature, &a, given, count, names)) {
        const int64_t sizes[2] = {0, hidden_of(&qkv->norm_weight)};
        qkv->x =
            (mv_view){.shape = sizes, .ndim = 2, .device = qkv->norm_weight.device, .dtype = qkv->norm_weight.dtype};
        for (int i = 0; i < c.count; i++)
            if (c.tensors[i].view.dtype != MV_F32) qkv->x.dtype = c.tensors[i].view.dtype;
        if (check_status(mv_rms_norm_qkv(qkv, &plan, &error), &error)) {
            const int64_t outputs = plan.output[0].columns;
            qkv->head_dim = outputs / (qkv->num_heads + 2 * qkv->num_kv_heads);
            result = Py_BuildValue("(LLLOy#)", (long long)sizes[1], (long long)outputs, (long long)qkv->head_dim,
                                   plan.weight_layout == MV_LAYOUT_IN_OUT ? Py_True : Py_False,
                                   (const char *)&a + NUMBERS_AT, (Py_ssize_t)NUMBERS_SIZE);
        }
    }
    end_call(&c);
    return result;
}

/* ---- have the weights changed? ---------------------------------------------------------------------------------- */

/* The weights of a call, and torch's counters of writes to them. The addresses are compared, never used. */
enum { MOST_WEIGHTS = 7 };
typedef struct {
    const void *object[MOST_WEIGHTS], *data[MOST_WEIGHTS];
    long long version[MOST_WEIGHTS];
} weight_versions;

static bool is_parameter(const mv_rms_norm_qkv_args *a, const mv_view *slot) {
    return slot == &a->norm_weight || (slot >= a->qkv_weight && slot < a->qkv_weight + 3) ||
           (slot >= a->bias && slot < a->bias + 3);
}

/* False where one of them has no counter: tensors of another framework, and those made in inference mode. */
static bool read_versions(call *c, const mv_rms_norm_qkv_args *a, weight_versions *versions) {
    int count = 0;
    for (int i = 0; i < c->count; i++) {
        const tensor *t = &c->tensors[i];
        if (!is_parameter(a, t->slot)) continue;
        if (t->kind.framework != &torch_framework || !torch_version_of(c, t, &versions->version[count])) return false;
        versions->object[count] = t->object;
        versions->data[count++] = t->view.data;
    }
    return true;
}

static bool same_versions(const weight_versions *a, const weight_versions *b) { return memcmp(a, b, sizeof *a) == 0; }

/* ---- calling it ------------------------------------------------------------------------------------------------- */

static bool to_numbers(call *c, const parameter *p, PyObject *value, void *target) {
    if (!PyBytes_Check(value) || PyBytes_Size(value) != NUMBERS_SIZE)
        return refuse_argument(c, p->name, PyExc_TypeError, "must be what _check_rms_norm_qkv() gave");
    memcpy(target, PyBytes_AsString(value), NUMBERS_SIZE);
    return true;
}

/* What a layer holds; _packed, where it is not None, in place of qkv_weight. */
static bool to_tensors_if_absent(call *c, const parameter *p, PyObject *value, void *target) {
    return is_given(target) || tensors_value.convert(c, p, value, target);
}
static const value_kind numbers_value = {HELD, false, to_numbers, NULL};
static const value_kind tensors_if_absent_value = {TENSORS, false, to_tensors_if_absent, qkv_members};

static const parameter layer_held_parameters[] = {
    QKV_PARAMETER(norm_weight, tensor_value, WEIGHT),
    {"_packed", &optional_tensors_value, WEIGHT, offsetof(mv_rms_norm_qkv_args, qkv_weight)},
    QKV_PARAMETER(qkv_weight, tensors_if_absent_value, WEIGHT),
    QKV_PARAMETER(bias, optional_tensors_value, WEIGHT),
    {"_numbers", &numbers_value, OPTION, offsetof(mv_rms_norm_qkv_args, num_heads)},
};
SIGNATURE(layer_held, SIGNATURE_LAYER_HELD, "FusedRMSNormQKV", .required = 0);

static const parameter layer_call_parameters[] = {
    QKV_PARAMETER(x, tensor_value, ROWS),
    QKV_PARAMETER(residual, optional_tensor_value, ROWS),
    QKV_PARAMETER(out, optional_tensor_value, OUTPUT),
    QKV_PARAMETER(residual_out, optional_tensor_value, OUTPUT),
};
SIGNATURE(layer_call, SIGNATURE_LAYER_CALL, "FusedRMSNormQKV", .required = 1, .positional = 1,
          .beside = &layer_held_signature);

/* The op would find fault with norm_weight, which the caller of a layer does not see. */
static bool check_width(call *c, const mv_rms_norm_qkv_args *a) {
    const int64_t got = hidden_of(&a->x), expected = hidden_of(&a->norm_weight);
    return got == expected || a->x.ndim == 0 || a->norm_weight.ndim != 1 ||
           refuse(c, tensor_of(c, &a->x), PyExc_ValueError, "has hidden size %lld, expected %lld (that of norm_weight)",
                  (long long)got, (long long)expected);
}

/* What C keeps in a layer, behind what Python does. vector: NULL before the first call. seen: by the last call that
 * looked at the counters. Both begin as zeros. */
typedef PyObject *vector_function(PyObject *callable, PyObject *const *given, size_t count, PyObject *names);
typedef struct {
    vector_function *vector;
    weight_versions seen;
} layer_tail;
static Py_ssize_t tail_offset; /* of any layer */
static PyTypeObject *layer_type;
static layer_tail *tail_of(PyObject *layer) { return (layer_tail *)((char *)layer + tail_offset); }

/* By its counters a layer vouches for weights that have not changed since its last call. After a change, whose kernel
 * may not have finished, one call is launched plainly: it begins when everything in front of it has finished, and
 * whatever comes after it begins later still. */
static PyObject *run_by_counters(call *c, mv_rms_norm_qkv_args *a, layer_tail *tail) {
    weight_versions now = {0};
    if (read_versions(c, a, &now)) {
        a->static_weights = same_versions(&now, &tail->seen);
        a->call.plain_launch = !a->static_weights;
    }
    PyObject *result = PyErr_Occurred() ? NULL : run_qkv(c, a, false);
    if (result) tail->seen = now;
    return result;
}

/* Messages about the arguments name the layer; what ran is the op. */
static PyObject *call_layer(PyObject *module, PyObject *layer, PyObject *const *given, Py_ssize_t count,
                            PyObject *names) {
    layer_args a = {.qkv.call.op = "rms_norm_qkv"};
    call c;
    begin_call(&c, module, layer_call_signature.op);
    c.torch_function = "_call_layer";
    c.self = layer;
    if (parse(&c, &layer_call_signature, &a, given, count, names) &&
        read_attributes(&c, &layer_held_signature, &a, layer) && check_width(&c, &a.qkv)) {
        const bool looks = a.by_counters && a.qkv.x.device.kind == MV_CUDA;
        c.result = looks ? run_by_counters(&c, &a.qkv, tail_of(layer)) : run_qkv(&c, &a.qkv, false);
    }
    end_call(&c);
    return c.result;
}

PyObject *py_call_layer(PyObject *module, PyObject *const *given, Py_ssize_t count, PyObject *names) {
    if (count < 1 || !layer_type || !PyObject_TypeCheck(given[0], layer_type))
        return PyErr_Format(PyExc_TypeError, "_call_layer: argument 1 must be a FusedRMSNormQKV");
    return call_layer(module, given[0], given + 1, count - 1, names);
}

/* layer._forget(): another tensor in place of one that is gone may have its address and its count. */
static PyObject *forget_weights(PyObject *layer, PyObject *none) {
    (void)none;
    memset(&tail_of(layer)->seen, 0, sizeof(weight_versions));
    Py_RETURN_NONE;
}

/* layer._vouches(): whether a call on a GPU would, which then remembers the counters as this does. */
static PyObject *vouches_for_weights(PyObject *layer, PyTypeObject *type, PyObject *const *given, Py_ssize_t count,
                                     PyObject *names) {
    (void)given, (void)count, (void)names;
    layer_args a = {.qkv.call.op = layer_call_signature.op};
    call c;
    begin_call(&c, PyType_GetModule(type), layer_call_signature.op);
    c.may_hand_over = false;
    if (read_attributes(&c, &layer_held_signature, &a, layer)) {
        weight_versions now = {0}, *const seen = &tail_of(layer)->seen;
        if (a.by_counters) a.qkv.static_weights = read_versions(&c, &a.qkv, &now) && same_versions(&now, seen);
        *seen = now;
        if (!PyErr_Occurred()) c.result = PyBool_FromLong(a.qkv.static_weights);
    }
    end_call(&c);
    return c.result;
}

/* layer.__call__(...), to which calls of subclasses come too. */
static PyObject *call_layer_method(PyObject *layer, PyTypeObject *type, PyObject *const *given, Py_ssize_t count,
                                   PyObject *names) {
    return call_layer(PyType_GetModule(type), layer, given, count, names);
}

/* layer(...) is a vectorcall: no tuple and no dict is made for it. CPython has had those since 3.9, its limited API
 * since 3.12, hence names of our own. */
enum { HAS_VECTORCALL = 1 << 11 }; /* Py_TPFLAGS_HAVE_VECTORCALL */
static const size_t mark_of_count = (size_t)1 << (8 * sizeof(size_t) - 1);

static PyObject *call_layer_vector(PyObject *layer, PyObject *const *given, size_t count, PyObject *names) {
    return call_layer(PyType_GetModule(Py_TYPE(layer)), layer, given, (Py_ssize_t)(count & ~mark_of_count), names);
}

/* The first call of a layer, however it was made: a copy, for one, runs no constructor. */
static PyObject *call_layer_slot(PyObject *layer, PyObject *arguments, PyObject *keywords) {
    __atomic_store_n(&tail_of(layer)->vector, call_layer_vector, __ATOMIC_RELAXED);
    PyObject *method = PyObject_GetAttrString(layer, "__call__");
    PyObject *result = method ? PyObject_Call(method, arguments, keywords) : NULL;
    Py_XDECREF(method);
    return result;
}

PyObject *py_callable_layer(PyObject *module, PyObject *class) {
    static PyMethodDef methods[] = {
        {"__call__", (PyCFunction)(void (*)(void))call_layer_method,
         METH_METHOD | METH_FASTCALL | METH_KEYWORDS | METH_COEXIST, DOC_CALL_LAYER},
        {"_forget", forget_weights, METH_NOARGS, "The weights count as changed."},
        {"_vouches", (PyCFunction)(void (*)(void))vouches_for_weights, METH_METHOD | METH_FASTCALL | METH_KEYWORDS,
         "Would a call on a GPU vouch for the weights? This counts as one: the counters are remembered."},
        {NULL, NULL, 0, NULL},
    };
    static PyMemberDef members[] = {
        {"__vectorcalloffset__", T_PYSSIZET, 0, READONLY, NULL},
        {NULL, 0, 0, 0, NULL},
    };
    static PyType_Slot slots[] = {
        {Py_tp_call, __extension__(void *) call_layer_slot},
        {Py_tp_methods, methods},
        {Py_tp_members, members},
        {0, NULL},
    };
    static PyType_Spec spec = {.name = "minivllm.layers.FusedRMSNormQKV",
                               .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | HAS_VECTORCALL,
                               .slots = slots};
    PyObject *size = PyObject_GetAttrString(class, "__basicsize__");
    if (!size) return NULL;
    const Py_ssize_t offset = PyLong_AsSsize_t(size);
    Py_DECREF(size);
    if (tail_offset != 0 && tail_offset != offset)
        return PyErr_Format(PyExc_TypeError,
                            "_callable_layer: %R has instances of %zd bytes, expected %zd, as those of the class that "
                            "it has made callable already",
                            class, offset, tail_offset);
    tail_offset = members[0].offset = offset;
    spec.basicsize = (int)(offset + (Py_ssize_t)sizeof(layer_tail));
    PyObject *bases = PyTuple_Pack(1, class);
    PyObject *type = bases ? PyType_FromModuleAndSpec(module, &spec, bases) : NULL;
    PyObject *text = type ? PyObject_GetAttrString(class, "__doc__") : NULL;
    if (!text || PyObject_SetAttrString(type, "__doc__", text) < 0) Py_CLEAR(type);
    Py_XDECREF(text);
    Py_XDECREF(bases);
    if (!layer_type) layer_type = (PyTypeObject *)Py_XNewRef(type);
    return type;
}

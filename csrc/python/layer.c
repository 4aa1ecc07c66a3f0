/* layer.c: see layer.h. A layer is an instance of a Python class that holds the weights; a call reads its attributes
 * here. */
#include "layer.h"

#include <string.h>
#include <structmember.h>

#include "buffers.h"
#include "docstrings.h"

/* ---- making one ------------------------------------------------------------------------------------------------- */

static const parameter check_parameters[] = {
    QKV_WEIGHT_PARAMETERS,
    QKV_PARAMETER("head_dim", to_optional_integer, head_dim),
    QKV_OPTION_PARAMETERS,
};
const signature check_signature = {"FusedRMSNormQKV", 4, 4, 5, LENGTH(check_parameters), check_parameters};

/* Every argument that is no tensor, as the bytes of the end of the args struct: a layer's are read once. */
enum {
    NUMBERS_AT = offsetof(mv_rms_norm_qkv_args, num_heads),
    NUMBERS_SIZE = sizeof(mv_rms_norm_qkv_args) - NUMBERS_AT
};

/* Everything that can be known before there is an x: (hidden, qkv, head_dim, numbers). Parameters are not read, so
 * gradients do not matter. Any weight that is not float32 tells x's dtype. */
PyObject *py_check_rms_norm_qkv(PyObject *module, PyObject *const *given, Py_ssize_t count, PyObject *names) {
    mv_rms_norm_qkv_args a = {.call.op = "FusedRMSNormQKV", .eps = 1e-6};
    mv_plan plan;
    mv_error error;
    PyObject *result = NULL;
    call c;
    begin_call(&c, module, a.call.op);
    c.may_hand_over = false;
    if (parse(&c, &check_signature, &a, given, count, names)) {
        const int64_t sizes[2] = {0, hidden_of(&a.norm_weight)};
        a.x = (mv_view){.shape = sizes, .ndim = 2, .device = a.norm_weight.device, .dtype = a.norm_weight.dtype};
        for (int i = 0; i < c.count; i++)
            if (c.tensors[i].view.dtype != MV_F32) a.x.dtype = c.tensors[i].view.dtype;
        if (check_status(mv_rms_norm_qkv(&a, &plan, &error), &error)) {
            a.head_dim = plan.head_dim;
            result = Py_BuildValue("(LLLy#)", (long long)sizes[1], (long long)plan.qkv, (long long)plan.head_dim,
                                   (const char *)&a + NUMBERS_AT, (Py_ssize_t)NUMBERS_SIZE);
        }
    }
    end_call(&c);
    return result;
}

/* ---- calling it ------------------------------------------------------------------------------------------------- */

static bool to_numbers(call *c, const parameter *p, PyObject *value, void *target) {
    if (!PyBytes_Check(value) || PyBytes_Size(value) != NUMBERS_SIZE)
        return refuse_argument(c, p->name, PyExc_TypeError, "must be what _check_rms_norm_qkv() gave");
    memcpy(target, PyBytes_AsString(value), NUMBERS_SIZE);
    return true;
}

/* What a layer holds; _packed, where it is not None, in place of qkv_weight. */
static bool to_tensors_if_absent(call *c, const parameter *p, PyObject *value, void *target) {
    return is_given(target) || to_tensors(c, p, value, target);
}

static const parameter held_parameters[] = {
    QKV_PARAMETER("norm_weight", to_tensor, norm_weight),
    QKV_PARAMETER("_packed", to_optional_tensors, qkv_weight),
    QKV_PARAMETER("qkv_weight", to_tensors_if_absent, qkv_weight),
    QKV_PARAMETER("bias", to_optional_tensors, bias),
    QKV_PARAMETER("_numbers", to_numbers, num_heads),
};
const signature held_signature = {"FusedRMSNormQKV", 5, 0, 0, LENGTH(held_parameters), held_parameters};

static const parameter call_parameters[] = {
    QKV_PARAMETER("x", to_tensor, x),
    QKV_PARAMETER("residual", to_optional_tensor, residual),
    QKV_PARAMETER("out", to_optional_tensor, out),
    QKV_PARAMETER("residual_out", to_optional_tensor, residual_out),
};
const signature call_signature = {"FusedRMSNormQKV", 6, 1, 1, LENGTH(call_parameters), call_parameters};

/* The op would find fault with norm_weight, which the caller of a layer does not see. */
static bool check_width(call *c, const mv_rms_norm_qkv_args *a) {
    const int64_t got = hidden_of(&a->x), expected = hidden_of(&a->norm_weight);
    return got == expected || a->x.ndim == 0 || a->norm_weight.ndim != 1 ||
           refuse(c, tensor_of(c, &a->x), PyExc_ValueError, "has hidden size %lld, expected %lld (that of norm_weight)",
                  (long long)got, (long long)expected);
}

/* Messages about the arguments name the layer; what ran is the op. */
static PyObject *call_layer(PyObject *module, PyObject *layer, PyObject *const *given, Py_ssize_t count,
                            PyObject *names) {
    mv_rms_norm_qkv_args a = {.call.op = "rms_norm_qkv"};
    call c;
    begin_call(&c, module, call_signature.op);
    c.torch_function = "_call_layer";
    c.self = layer;
    if (parse(&c, &call_signature, &a, given, count, names) && read_attributes(&c, &held_signature, &a, layer) &&
        check_width(&c, &a))
        c.result = run_qkv(&c, &a, false);
    end_call(&c);
    return c.result;
}

PyObject *py_call_layer(PyObject *module, PyObject *const *given, Py_ssize_t count, PyObject *names) {
    if (count < 1) return PyErr_Format(PyExc_TypeError, "_call_layer: layer is missing (argument 1)");
    return call_layer(module, given[0], given + 1, count - 1, names);
}

/* layer.__call__(...), to which calls of subclasses come too. */
static PyObject *call_layer_method(PyObject *layer, PyTypeObject *type, PyObject *const *given, Py_ssize_t count,
                                   PyObject *names) {
    return call_layer(PyType_GetModule(type), layer, given, count, names);
}

/* layer(...) is a vectorcall: no tuple and no dict is made for it. CPython has had those since 3.9, its limited API
 * since 3.12, hence names of our own. */
typedef PyObject *vector_function(PyObject *callable, PyObject *const *given, size_t count, PyObject *names);
enum { HAS_VECTORCALL = 1 << 11 }; /* Py_TPFLAGS_HAVE_VECTORCALL */
static const size_t mark_of_count = (size_t)1 << (8 * sizeof(size_t) - 1);
static Py_ssize_t vector_offset; /* of the function in a layer; NULL stands there before the first call */

static PyObject *call_layer_vector(PyObject *layer, PyObject *const *given, size_t count, PyObject *names) {
    return call_layer(PyType_GetModule(Py_TYPE(layer)), layer, given, (Py_ssize_t)(count & ~mark_of_count), names);
}

/* The first call of a layer, however it was made: a copy, for one, runs no constructor. */
static PyObject *call_layer_slot(PyObject *layer, PyObject *arguments, PyObject *keywords) {
    vector_function **place = (vector_function **)((char *)layer + vector_offset);
    __atomic_store_n(place, call_layer_vector, __ATOMIC_RELAXED);
    PyObject *method = PyObject_GetAttrString(layer, "__call__");
    PyObject *result = method ? PyObject_Call(method, arguments, keywords) : NULL;
    Py_XDECREF(method);
    return result;
}

PyObject *py_callable_layer(PyObject *module, PyObject *class) {
    static PyMethodDef methods[] = {
        {"__call__", (PyCFunction)(void (*)(void))call_layer_method,
         METH_METHOD | METH_FASTCALL | METH_KEYWORDS | METH_COEXIST, DOC_CALL_LAYER},
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
    vector_offset = members[0].offset = PyLong_AsSsize_t(size);
    spec.basicsize = (int)(vector_offset + (Py_ssize_t)sizeof(vector_function *));
    Py_DECREF(size);
    PyObject *bases = PyTuple_Pack(1, class);
    PyObject *type = bases ? PyType_FromModuleAndSpec(module, &spec, bases) : NULL;
    PyObject *text = type ? PyObject_GetAttrString(class, "__doc__") : NULL;
    if (!text || PyObject_SetAttrString(type, "__doc__", text) < 0) Py_CLEAR(type);
    Py_XDECREF(text);
    Py_XDECREF(bases);
    return type;
}

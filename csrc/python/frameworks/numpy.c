/* numpy.c: NumPy arrays, through __array_struct__: a C struct, so no attribute per field and no NumPy header. bfloat16
 * is the dtype of ml_dtypes, known by identity: the struct shows only two bytes of "void". */
#include "numpy.h"

#include "../base/refusals.h"
#include "slices.h"
#include "views.h"

/* NumPy's array interface, C side. */
typedef struct {
    int two;
    int nd;
    char typekind;
    int itemsize;
    int flags;
    Py_intptr_t *shape;
    Py_intptr_t *strides;
    void *data;
    PyObject *descr;
} array_struct;

enum { NATIVE_ORDER = 0x200, WRITEABLE = 0x400 };

PyObject *numpy_dtype(module_state *state, mv_dtype dtype) {
    PyObject *made = atomic_load_explicit(&state->numpy_dtypes[dtype], memory_order_acquire);
    if (made) return made;
    PyObject *make = known(state, NUMPY_DTYPE);
    PyObject *type = make ? known(state, NUMPY_TYPES + (int)dtype) : NULL;
    return keep_first(&state->numpy_dtypes[dtype], type ? PyObject_CallFunctionObjArgs(make, type, NULL) : NULL);
}

/* Who has not imported ml_dtypes has none of its arrays. */
static bool is_bfloat16_loaded(void) {
    PyObject *type = loaded("ml_dtypes", "bfloat16");
    Py_XDECREF(type);
    return type != NULL;
}

bool dtype_of_numpy(module_state *state, PyObject *dtype, mv_dtype *out) {
    for (int i = 0; i < DTYPES; i++) {
        PyObject *made = atomic_load_explicit(&state->numpy_dtypes[i], memory_order_acquire);
        if (!made) made = i == MV_BF16 && !is_bfloat16_loaded() ? NULL : numpy_dtype(state, (mv_dtype)i);
        if (made && (made == dtype || PyObject_RichCompareBool(made, dtype, Py_EQ) == 1)) {
            *out = (mv_dtype)i;
            return true;
        }
        PyErr_Clear();
    }
    return false;
}

static bool refuse_byte_order(call *c, tensor *t) {
    PyObject *dtype = PyObject_GetAttr(t->object, c->state->names[NAME_DTYPE]);
    if (dtype)
        refuse(c, t, PyExc_TypeError,
               "is not in this machine's byte order (dtype %S); pass a copy that is, by "
               "astype(dtype.newbyteorder('='))",
               dtype);
    Py_XDECREF(dtype);
    return false;
}

static bool dtype_of_struct(call *c, tensor *t, const array_struct *array) {
    if (array->typekind == 'f' && array->itemsize == 4)
        t->view.dtype = MV_F32;
    else if (array->typekind == 'f' && array->itemsize == 2)
        t->view.dtype = MV_F16;
    else if (array->typekind == 'i' && array->itemsize == 4)
        t->view.dtype = MV_I32;
    else if (array->typekind == 'i' && array->itemsize == 8)
        t->view.dtype = MV_I64;
    else if (array->typekind == 'b' && array->itemsize == 1)
        t->view.dtype = MV_BOOL;
    else {
        PyObject *dtype = PyObject_GetAttr(t->object, c->state->names[NAME_DTYPE]);
        const bool found = dtype && dtype_of_numpy(c->state, dtype, &t->view.dtype);
        Py_XDECREF(dtype);
        if (!found) return refuse_dtype(c, t, NULL);
    }
    if (!is_wanted(t, t->view.dtype)) return refuse_dtype(c, t, NULL);
    return (array->flags & NATIVE_ORDER) || refuse_byte_order(c, t);
}

/* The struct of a subclass may be another array's, which the capsule keeps. */
static bool numpy_view(call *c, tensor *t) {
    PyObject *capsule = PyObject_GetAttr(t->object, c->state->names[NAME_ARRAY_STRUCT]);
    const array_struct *array = capsule ? PyCapsule_GetPointer(capsule, NULL) : NULL;
    if (!array || array->two != 2) {
        Py_XDECREF(capsule);
        return refuse_because(c, t, PyExc_BufferError, "cannot be read through its __array_struct__");
    }
    bool ok = dtype_of_struct(c, t, array);
    if (ok && array->nd > MAX_DIMS)
        ok = refuse(c, t, PyExc_ValueError, "has %d dimensions, expected at most %d", array->nd, MAX_DIMS);
    if (ok) {
        t->view.ndim = array->nd;
        t->view.data = array->data;
        t->view.read_only = !(array->flags & WRITEABLE);
        for (int d = 0; d < array->nd; d++) {
            t->shape[d] = array->shape[d];
            t->strides[d] = array->strides[d];
        }
        ok = strides_from_bytes(c, t) && check_view(c, t);
    }
    t->keeper = capsule;
    return ok;
}

PyObject *numpy_new(module_state *state, mv_dtype dtype, int ndim, const int64_t *shape) {
    PyObject *empty = known(state, NUMPY_EMPTY);
    PyObject *type = empty ? numpy_dtype(state, dtype) : NULL;
    PyObject *sizes = type ? shape_tuple(ndim, shape) : NULL;
    PyObject *result = sizes ? PyObject_CallFunctionObjArgs(empty, sizes, type, NULL) : NULL;
    Py_XDECREF(sizes);
    return result;
}

static bool numpy_empty(call *c, const tensor *like, tensor *made) {
    (void)like;
    made->object = numpy_new(c->state, made->view.dtype, made->view.ndim, made->shape);
    return made->object != NULL;
}

const framework numpy_framework = {.name = "NumPy",
                                   .to_float32 = ".astype('float32')",
                                   .view = numpy_view,
                                   .empty = numpy_empty,
                                   .split = split_by_slices};

static bool refuse_masked(call *c, tensor *t) {
    return refuse(c, t, PyExc_TypeError, "is a masked array, whose mask no op knows; pass its data or filled()");
}

const framework masked_framework = {.name = "NumPy, masked", .view = refuse_masked};

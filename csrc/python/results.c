/* results.c: see results.h. */
#include "results.h"

#include <string.h>

#include "buffers.h"

bool provide(call *c, const char *name, mv_view *slot, const mv_view *x, int last_count, const int64_t *last) {
    if (is_given(slot)) return true;
    const tensor *like = tensor_of(c, x);
    int64_t shape[MAX_DIMS + 1];
    const int lead = x->ndim - 1;
    if (lead + last_count > MAX_DIMS)
        return refuse(c, like, PyExc_ValueError, "has %d dimensions, expected at most %d", (int)x->ndim,
                      MAX_DIMS + 1 - last_count);
    memcpy(shape, x->shape, (size_t)lead * sizeof shape[0]);
    memcpy(shape + lead, last, (size_t)last_count * sizeof shape[0]);
    tensor *made = add_fresh_tensor(c, name, like, slot);
    return like->kind.framework->empty(c, like, lead + last_count, shape, made) &&
           view_fresh_tensor(c, made, like, lead + last_count, shape);
}

bool provide_workspace(call *c, const mv_view *x, size_t bytes, void **workspace) {
    enum { ALIGNMENT = 256 };
    if (bytes == 0) return true;
    void *data = NULL;
    if (x->device.kind == MV_CPU) {
        data = c->scratch = PyMem_Malloc(bytes + ALIGNMENT);
        if (!data) PyErr_NoMemory();
    } else {
        const tensor *like = tensor_of(c, x);
        tensor *made = add_fresh_tensor(c, "workspace", like, NULL);
        if (like->kind.framework->scratch(c, like, bytes + ALIGNMENT, made)) data = made->view.data;
    }
    if (!data) return false;
    *workspace = (void *)(((uintptr_t)data + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    return true;
}

static bool note_write(call *c, const tensor *result) {
    const framework *from = result->kind.framework;
    return result->fresh || !from->written || from->written(c, result);
}

static PyObject *finished(call *c, tensor *result, const tensor *like) {
    if (result->fresh && like->kind.framework->finish) return like->kind.framework->finish(c, like, result);
    if (!note_write(c, result)) return NULL;
    Py_INCREF(result->object);
    return result->object;
}

PyObject *returned(call *c, const mv_view *slot, const mv_view *x) {
    return finished(c, tensor_of(c, slot), tensor_of(c, x));
}

PyObject *returned_parts(call *c, const mv_view *slot, const mv_view *x, const head_counts *counts) {
    const tensor *result = tensor_of(c, slot), *like = tensor_of(c, x);
    const bool unfinished = result->fresh && like->kind.framework->finish;
    return (unfinished ? like : result)->kind.framework->split(c, like, result, counts);
}

/* ---- for several frameworks ------------------------------------------------------------------------------------- */

PyObject *shape_tuple(int ndim, const int64_t *shape) {
    PyObject *tuple = PyTuple_New(ndim);
    for (int d = 0; tuple && d < ndim; d++) {
        PyObject *size = PyLong_FromLongLong(shape[d]);
        if (!size || PyTuple_SetItem(tuple, d, size) < 0) Py_CLEAR(tuple);
    }
    return tuple;
}

void contiguous_strides(int ndim, const int64_t *shape, int64_t *strides) {
    int64_t step = 1;
    for (int d = ndim - 1; d >= 0; step *= shape[d], d--) strides[d] = step;
}

/* The limited API of 3.11 has only a borrowed reference, which without a GIL another thread may take away. */
PyObject *item_of(PyObject *dict, PyObject *key) {
#ifdef Py_GIL_DISABLED
    PyObject *value;
    return PyDict_GetItemRef(dict, key, &value) > 0 ? value : NULL;
#else
    return Py_XNewRef(PyDict_GetItemWithError(dict, key));
#endif
}

bool ints_of_tuple(PyObject *object, int64_t *values, int *count) {
    PyObject *tuple = PySequence_Tuple(object);
    const Py_ssize_t size = tuple ? PyTuple_Size(tuple) : 0;
    bool ok = tuple && size <= MAX_DIMS;
    if (tuple && !ok) PyErr_Format(PyExc_ValueError, "%zd dimensions, expected at most %d", size, MAX_DIMS);
    for (int d = 0; ok && d < size; d++) {
        values[d] = PyLong_AsLongLong(PyTuple_GetItem(tuple, d));
        ok = values[d] != -1 || !PyErr_Occurred();
    }
    Py_XDECREF(tuple);
    *count = (int)size;
    return ok;
}

bool take_pointer(PyObject *object, const char *attribute, void **pointer) {
    PyObject *value = PyObject_GetAttrString(object, attribute);
    Py_DECREF(object);
    if (!value) return false;
    *pointer = PyLong_AsVoidPtr(value);
    Py_DECREF(value);
    return *pointer || !PyErr_Occurred();
}

static PyObject *new_device_array(call *c, int32_t device, const char *dtype, int ndim, const int64_t *shape) {
    PyObject *make = known(c->state, DEVICE_ARRAY_EMPTY);
    PyObject *sizes = make ? shape_tuple(ndim, shape) : NULL;
    PyObject *where = sizes ? PyUnicode_FromFormat("cuda:%d", (int)device) : NULL;
    PyObject *result = where ? PyObject_CallFunction(make, "OsO", sizes, dtype, where) : NULL;
    Py_XDECREF(where);
    Py_XDECREF(sizes);
    return result;
}

bool plain_empty(call *c, const tensor *like, int ndim, const int64_t *shape, tensor *made) {
    const mv_dtype dtype = like->view.dtype;
    const bool cuda = like->view.device.kind == MV_CUDA;
    made->object = cuda ? new_device_array(c, like->view.device.index, dtype_names[dtype], ndim, shape)
                        : numpy_new(c->state, dtype, ndim, shape);
    if (!made->object && !cuda && dtype == MV_BF16)
        refuse_because(c, like, PyExc_RuntimeError,
                       "is bfloat16, and a NumPy result of that dtype needs ml_dtypes "
                       "(pip install ml_dtypes), or pass out=");
    return made->object != NULL;
}

bool plain_scratch(call *c, const tensor *like, size_t bytes, tensor *made) {
    const int64_t size = (int64_t)((bytes + 3) / 4);
    made->object = new_device_array(c, like->view.device.index, "float32", 1, &size);
    Py_XINCREF(made->object);
    return made->object && take_pointer(made->object, "_pointer", &made->view.data);
}

PyObject *split_shape(const tensor *out, const head_counts *n) {
    int64_t shape[MAX_DIMS + 1];
    const int lead = out->view.ndim - 1;
    memcpy(shape, out->shape, (size_t)lead * sizeof shape[0]);
    shape[lead] = n->heads[0] + n->heads[1] + n->heads[2];
    shape[lead + 1] = n->head_dim;
    return shape_tuple(lead + 2, shape);
}

/* base[..., first:last, :] */
static PyObject *slice_heads(PyObject *base, int64_t first, int64_t last) {
    PyObject *start = PyLong_FromLongLong(first), *stop = PyLong_FromLongLong(last);
    PyObject *heads = start && stop ? PySlice_New(start, stop, NULL) : NULL, *all = PySlice_New(NULL, NULL, NULL);
    PyObject *key = heads && all ? PyTuple_Pack(3, Py_Ellipsis, heads, all) : NULL;
    PyObject *part = key ? PyObject_GetItem(base, key) : NULL;
    Py_XDECREF(key);
    Py_XDECREF(all);
    Py_XDECREF(heads);
    Py_XDECREF(stop);
    Py_XDECREF(start);
    return part;
}

PyObject *slices_of(call *c, PyObject *packed, const tensor *out, const head_counts *n) {
    PyObject *base = packed;
    if (out->fresh) {
        Py_INCREF(base);
    } else {
        PyObject *shape = split_shape(out, n);
        base = shape ? PyObject_CallMethodObjArgs(packed, c->state->names[NAME_RESHAPE], shape, NULL) : NULL;
        Py_XDECREF(shape);
    }
    PyObject *parts = base ? PyTuple_New(3) : NULL;
    int64_t first = 0;
    for (int i = 0; parts && i < 3; i++) {
        PyObject *part = slice_heads(base, first, first + n->heads[i]);
        if (!part || PyTuple_SetItem(parts, i, part) < 0) Py_CLEAR(parts);
        first += n->heads[i];
    }
    Py_XDECREF(base);
    return parts;
}

bool check_splittable(call *c, const mv_view *slot) {
    const tensor *out = is_given(slot) ? tensor_of(c, slot) : NULL;
    if (!out || out->kind.framework->split != split_by_slices ||
        PyObject_HasAttr(out->object, c->state->names[NAME_RESHAPE]))
        return true;
    return refuse(c, out, PyExc_TypeError, "cannot be cut into q, k and v: it has no reshape; pass an array that has");
}

PyObject *split_by_slices(call *c, const tensor *like, const tensor *out, const head_counts *n) {
    (void)like;
    return slices_of(c, out->object, out, n);
}

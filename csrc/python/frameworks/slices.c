/* slices.c: see slices.h. */
#include "slices.h"

#include <string.h>

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

PyObject *split_by_slices(call *c, const tensor *like, const tensor *out, const head_counts *n) {
    (void)like;
    return slices_of(c, out->object, out, n);
}

/* values.c: see values.h. */
#include "values.h"

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

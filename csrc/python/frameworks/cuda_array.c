/* cuda_array.c: objects that have only __cuda_array_interface__ (version 2 or 3). It carries no device, so this is the
 * one place where a pointer is queried. Launches go to the legacy default stream and wait for the exporter's stream. */
#include "cuda_array.h"

#include "../base/refusals.h"
#include "plain.h"
#include "slices.h"
#include "views.h"

static PyObject *item(PyObject *interface, const char *key) { /* NULL when absent or None */
    PyObject *name = PyUnicode_FromString(key);
    PyObject *value = name ? item_of(interface, name) : NULL;
    Py_XDECREF(name);
    PyErr_Clear(); /* of a key that cannot be compared: it is none of these */
    if (value == Py_None) Py_CLEAR(value);
    return value;
}

static bool refuse_malformed(call *c, tensor *t, const char *key) {
    return refuse_because(c, t, PyExc_BufferError, "has a __cuda_array_interface__ with a malformed %s", key);
}

static bool read_dtype(call *c, tensor *t, PyObject *interface) {
    static const char *const expected[] = {[HOLDS_FLOATS] =
                                               "'<f4' or '<f2' (bfloat16 has none: pass an object with __dlpack__)",
                                           [HOLDS_INTEGERS] = "'<i4' or '<i8'",
                                           [HOLDS_FLAGS] = "'|b1'"};
    PyObject *typestr = item(interface, "typestr");
    bool ok = typestr && PyUnicode_Check(typestr);
    if (!ok) {
        refuse(c, t, PyExc_BufferError, "has a __cuda_array_interface__ without typestr");
    } else if (PyUnicode_CompareWithASCIIString(typestr, "<f4") == 0) {
        t->view.dtype = MV_F32;
    } else if (PyUnicode_CompareWithASCIIString(typestr, "<f2") == 0) {
        t->view.dtype = MV_F16;
    } else if (PyUnicode_CompareWithASCIIString(typestr, "<i4") == 0) {
        t->view.dtype = MV_I32;
    } else if (PyUnicode_CompareWithASCIIString(typestr, "<i8") == 0) {
        t->view.dtype = MV_I64;
    } else if (PyUnicode_CompareWithASCIIString(typestr, "|b1") == 0) {
        t->view.dtype = MV_BOOL;
    } else {
        ok = false;
    }
    ok = ok && is_wanted(t, t->view.dtype);
    if (!ok && !PyErr_Occurred())
        refuse(c, t, PyExc_TypeError, "has typestr %R, expected %s", typestr, expected[t->holds]);
    Py_XDECREF(typestr);
    return ok;
}

static bool read_stream(call *c, tensor *t, PyObject *interface) {
    PyObject *stream = item(interface, "stream");
    if (!stream) return true; /* the exporter asks for no ordering */
    t->producer = PyLong_AsVoidPtr(stream);
    Py_DECREF(stream);
    if (PyErr_Occurred()) return refuse_malformed(c, t, "stream");
    t->has_producer = true;
    return t->producer || refuse(c, t, PyExc_ValueError,
                                 "has a __cuda_array_interface__ with stream 0, expected None, "
                                 "1 (the legacy default stream), 2 (per thread) or a handle");
}

/* data: (pointer, read_only). */
static bool read_data(call *c, tensor *t, PyObject *interface) {
    PyObject *data = item(interface, "data");
    PyObject *pointer;
    int read_only;
    bool ok = data && PyTuple_Check(data) && PyArg_ParseTuple(data, "Op", &pointer, &read_only);
    if (ok) {
        t->view.data = PyLong_AsVoidPtr(pointer);
        t->view.read_only = read_only;
        ok = !PyErr_Occurred() || refuse_malformed(c, t, "data");
    } else {
        PyErr_Clear();
        refuse(c, t, PyExc_BufferError, "has a __cuda_array_interface__ whose data is not (pointer, read_only)");
    }
    Py_XDECREF(data);
    return ok;
}

/* Integers, one for each dimension. False also where there are none, without an exception. */
static bool read_numbers(PyObject *interface, const char *key, int64_t *numbers, int *count) {
    PyObject *given = item(interface, key);
    const bool ok = given && ints_of_tuple(given, numbers, count);
    Py_XDECREF(given);
    return ok;
}

static bool is_masked(PyObject *interface) {
    PyObject *mask = item(interface, "mask");
    Py_XDECREF(mask);
    return mask != NULL;
}

static bool read_interface(call *c, tensor *t, PyObject *interface) {
    int ndim = 0, stride_count = 0;
    if (is_masked(interface)) return refuse(c, t, PyExc_ValueError, "is masked; pass an array without a mask");
    if (!read_numbers(interface, "shape", t->shape, &ndim)) return refuse_malformed(c, t, "shape");
    t->view.ndim = ndim;
    if (!read_dtype(c, t, interface) || !read_data(c, t, interface) || !read_stream(c, t, interface)) return false;
    if (read_numbers(interface, "strides", t->strides, &stride_count)) {
        if (stride_count != ndim) return refuse_malformed(c, t, "strides");
        if (!strides_from_bytes(c, t)) return false;
    } else {
        if (PyErr_Occurred()) return refuse_malformed(c, t, "strides");
        t->view.strides = NULL;
    }
    if (!check_view(c, t)) return false;
    t->view.device =
        (mv_device){MV_CUDA, c->device < 0 ? 0 : c->device}; /* an empty array may have no pointer to ask */
    mv_error error;
    const mv_status status = t->view.data ? mv_cuda_pointer_device(t->view.data, &t->view.device.index, &error) : MV_OK;
    return status == MV_OK || refuse(c, t, status == MV_BAD_VALUE ? PyExc_ValueError : PyExc_RuntimeError,
                                     "has a __cuda_array_interface__, but %s", error.text);
}

static bool cuda_array_view(call *c, tensor *t) {
    PyObject *interface = PyObject_GetAttr(t->object, c->state->names[NAME_CUDA_ARRAY_INTERFACE]);
    if (!interface || !PyDict_Check(interface)) {
        Py_XDECREF(interface);
        return refuse_because(c, t, PyExc_BufferError, "has a __cuda_array_interface__ that is no dict");
    }
    const bool ok = read_interface(c, t, interface);
    Py_DECREF(interface);
    return ok;
}

const framework cuda_array_framework = {.name = "CUDA array interface",
                                        .view = cuda_array_view,
                                        .empty = plain_empty,
                                        .scratch = plain_scratch,
                                        .split = split_by_slices};

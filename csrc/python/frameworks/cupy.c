/* cupy.c: CuPy arrays, read attribute by attribute: their own __cuda_array_interface__ knows no bfloat16, and their
 * __dlpack__ queries the pointer. CuPy allocates on its current device, so allocations switch to x's first. */
#include "cupy.h"

#include "../base/refusals.h"
#include "numpy.h"
#include "slices.h"
#include "views.h"

static bool cupy_view(call *c, tensor *t) {
    PyObject *const *names = c->state->names;
    PyObject *memory = PyObject_GetAttr(t->object, names[NAME_DATA]);
    PyObject *pointer = memory ? PyObject_GetAttr(memory, names[NAME_PTR]) : NULL;
    PyObject *device = pointer ? PyObject_GetAttr(memory, names[NAME_DEVICE_ID]) : NULL;
    PyObject *dtype = device ? PyObject_GetAttr(t->object, names[NAME_DTYPE]) : NULL;
    PyObject *shape = dtype ? PyObject_GetAttr(t->object, names[NAME_SHAPE]) : NULL;
    PyObject *strides = shape ? PyObject_GetAttr(t->object, names[NAME_STRIDES]) : NULL;
    int ndim = 0, stride_count = 0;
    bool ok = strides && ints_of_tuple(shape, t->shape, &ndim) && ints_of_tuple(strides, t->strides, &stride_count) &&
              ndim == stride_count;
    if (ok) {
        t->view.data = PyLong_AsVoidPtr(pointer);
        t->view.device = (mv_device){MV_CUDA, (int32_t)PyLong_AsLong(device)};
        t->view.ndim = ndim;
        ok = !PyErr_Occurred();
    }
    if (!ok) {
        refuse_because(c, t, PyExc_BufferError, "cannot be read");
    } else if (!dtype_of_numpy(c->state, dtype, &t->view.dtype) || !is_wanted(t, t->view.dtype)) {
        ok = refuse_dtype(c, t, NULL);
    } else {
        ok = strides_from_bytes(c, t) && check_view(c, t);
    }
    Py_XDECREF(strides);
    Py_XDECREF(shape);
    Py_XDECREF(dtype);
    Py_XDECREF(device);
    Py_XDECREF(pointer);
    Py_XDECREF(memory);
    return ok;
}

static bool cupy_stream(call *c, const tensor *t, void **stream) {
    PyObject *current = known(c->state, CUPY_CURRENT_STREAM);
    PyObject *object = current ? PyObject_CallFunction(current, "i", (int)t->view.device.index) : NULL;
    return object && take_pointer(object, "ptr", stream);
}

/* cupy.empty(size, dtype), on `index`. */
static PyObject *cupy_new(call *c, int index, PyObject *size, PyObject *dtype) {
    PyObject *empty = known(c->state, CUPY_EMPTY);
    PyObject *make_device = empty ? known(c->state, CUPY_DEVICE) : NULL;
    PyObject *device = make_device ? PyObject_CallFunction(make_device, "i", index) : NULL;
    PyObject *entered = device ? PyObject_CallMethod(device, "__enter__", NULL) : NULL;
    if (!entered) {
        Py_XDECREF(device);
        return NULL;
    }
    PyObject *result = PyObject_CallFunctionObjArgs(empty, size, dtype, NULL);
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyObject *left = PyObject_CallMethod(device, "__exit__", "OOO", Py_None, Py_None, Py_None);
    if (!left) Py_CLEAR(result);
    if (type) PyErr_Restore(type, value, traceback);
    Py_XDECREF(left);
    Py_DECREF(entered);
    Py_DECREF(device);
    return result;
}

static bool cupy_empty(call *c, const tensor *like, tensor *made) {
    PyObject *dtype = numpy_dtype(c->state, made->view.dtype);
    PyObject *size = dtype ? shape_tuple(made->view.ndim, made->shape) : NULL;
    made->object = size ? cupy_new(c, like->view.device.index, size, dtype) : NULL;
    Py_XDECREF(size);
    return made->object != NULL;
}

static bool cupy_scratch(call *c, const tensor *like, size_t bytes, tensor *made) {
    PyObject *size = PyLong_FromSize_t(bytes);
    PyObject *dtype = PyUnicode_FromString("uint8");
    made->object = size && dtype ? cupy_new(c, like->view.device.index, size, dtype) : NULL;
    Py_XDECREF(dtype);
    Py_XDECREF(size);
    PyObject *memory = made->object ? PyObject_GetAttr(made->object, c->state->names[NAME_DATA]) : NULL;
    return memory && take_pointer(memory, "ptr", &made->view.data);
}

const framework cupy_framework = {.name = "CuPy",
                                  .to_float32 = ".astype('float32')",
                                  .view = cupy_view,
                                  .stream = cupy_stream,
                                  .empty = cupy_empty,
                                  .scratch = cupy_scratch,
                                  .split = split_by_slices};

/* plain.c: see plain.h. */
#include "plain.h"

#include "../base/refusals.h"
#include "numpy.h"
#include "views.h"

static PyObject *new_device_array(call *c, int32_t device, const char *dtype, int ndim, const int64_t *shape) {
    PyObject *make = known(c->state, DEVICE_ARRAY_EMPTY);
    PyObject *sizes = make ? shape_tuple(ndim, shape) : NULL;
    PyObject *where = sizes ? PyUnicode_FromFormat("cuda:%d", (int)device) : NULL;
    PyObject *result = where ? PyObject_CallFunction(make, "OsO", sizes, dtype, where) : NULL;
    Py_XDECREF(where);
    Py_XDECREF(sizes);
    return result;
}

bool plain_empty(call *c, const tensor *like, tensor *made) {
    const mv_dtype dtype = made->view.dtype;
    const bool cuda = like->view.device.kind == MV_CUDA;
    const int ndim = made->view.ndim;
    made->object = cuda ? new_device_array(c, like->view.device.index, dtype_names[dtype], ndim, made->shape)
                        : numpy_new(c->state, dtype, ndim, made->shape);
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

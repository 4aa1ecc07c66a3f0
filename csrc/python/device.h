/* device.h: the primitives under minivllm.device_array.DeviceArray, and what a view of any object looks like. */
#ifndef MV_PYTHON_DEVICE_H
#define MV_PYTHON_DEVICE_H

#include "base/state.h"

PyObject *py_allocate(PyObject *module, PyObject *args);
PyObject *py_address(PyObject *module, PyObject *memory);
PyObject *py_copy_from_host(PyObject *module, PyObject *args);
PyObject *py_copy_to_host(PyObject *module, PyObject *args);
PyObject *py_stream_wait(PyObject *module, PyObject *args);
PyObject *py_to_dlpack(PyObject *module, PyObject *args);
PyObject *py_kind(PyObject *module, PyObject *object);
PyObject *py_view(PyObject *module, PyObject *object);
PyObject *py_empty(PyObject *module, PyObject *args);

#endif

/* info.h: what this build has, what this machine has, what ran. */
#ifndef MV_PYTHON_INFO_H
#define MV_PYTHON_INFO_H

#include "ops/ops.h"

PyObject *py_kernels(PyObject *module, PyObject *unused);
PyObject *py_last_kernel(PyObject *module, PyObject *unused);
fast_function py_set_num_threads;
PyObject *py_get_num_threads(PyObject *module, PyObject *unused);
PyObject *py_cpu_features(PyObject *module, PyObject *unused);
PyObject *py_cuda_archs(PyObject *module, PyObject *unused);
PyObject *py_cuda_device_count(PyObject *module, PyObject *unused);
PyObject *py_launch_nothing(PyObject *module, PyObject *device);
PyObject *py_cuda_device_info(PyObject *module, PyObject *device);

extern const signature set_num_threads_signature;

#endif

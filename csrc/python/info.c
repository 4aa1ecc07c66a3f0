/* info.c: see info.h. */
#include "info.h"

#include "base/refusals.h"
#include "frameworks/views.h"

/* [(op, name, dtype, isa, usable, why_not), ...] */
PyObject *py_kernels(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    PyObject *list = PyList_New(0);
    mv_kernel_info info;
    for (int i = 0; list && mv_kernel_at(i, &info); i++) {
        PyObject *row = Py_BuildValue("(ssssOs)", info.op, info.name, dtype_names[info.dtype], info.isa,
                                      info.usable ? Py_True : Py_False, info.why_not);
        if (!row || PyList_Append(list, row) < 0) Py_CLEAR(list);
        Py_XDECREF(row);
    }
    return list;
}

/* (op, name, why) or None */
PyObject *py_last_kernel(PyObject *module, PyObject *unused) {
    mv_ran ran;
    (void)module, (void)unused;
    if (!mv_last_kernel(&ran)) Py_RETURN_NONE;
    return Py_BuildValue("(sss)", ran.op, ran.name, ran.why);
}

static const parameter set_num_threads_parameters[] = {{"n", &integer_value, OPTION, 0}};
SIGNATURE(set_num_threads, SIGNATURE_SET_NUM_THREADS, "set_num_threads", .required = 1, .positional = 1);

PyObject *py_set_num_threads(PyObject *module, PyObject *const *given, Py_ssize_t count, PyObject *names) {
    int64_t n = 0;
    call c;
    begin_call(&c, module, set_num_threads_signature.op);
    const bool ok = parse(&c, &set_num_threads_signature, &n, given, count, names);
    end_call(&c);
    if (!ok) return NULL;
    if (n > MV_MAX_THREADS)
        return PyErr_Format(PyExc_ValueError, "set_num_threads: n is %lld, expected at most %d", (long long)n,
                            MV_MAX_THREADS);
    mv_set_num_threads(n < 1 ? 0 : (int)n);
    Py_RETURN_NONE;
}

PyObject *py_get_num_threads(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyLong_FromLong(mv_get_num_threads());
}

PyObject *py_cpu_features(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyUnicode_FromString(mv_cpu_features());
}

PyObject *py_cuda_archs(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyUnicode_FromString(mv_cuda_archs());
}

PyObject *py_cuda_device_count(PyObject *module, PyObject *unused) {
    int32_t count;
    mv_error error;
    (void)module, (void)unused;
    return check_status(mv_cuda_device_count(&count, &error), &error) ? PyLong_FromLong(count) : NULL;
}

/* _launch_nothing(device) */
PyObject *py_launch_nothing(PyObject *module, PyObject *device) {
    mv_error error;
    (void)module;
    const long index = PyLong_AsLong(device);
    if (index == -1 && PyErr_Occurred()) return NULL;
    if (!check_status(mv_cuda_launch_nothing((int32_t)index, &error), &error)) return NULL;
    Py_RETURN_NONE;
}

PyObject *py_cuda_device_info(PyObject *module, PyObject *device) {
    mv_cuda_info info;
    mv_error error;
    (void)module;
    const long index = PyLong_AsLong(device);
    if (index == -1 && PyErr_Occurred()) return NULL;
    if (index != (int32_t)index) return PyErr_Format(PyExc_ValueError, "cuda_device_info: there is no GPU %ld", index);
    if (!check_status(mv_cuda_device_info((int32_t)index, &info, &error), &error)) return NULL;
    return Py_BuildValue("{sssisisisisLsLsOsO}", "name", info.name, "compute_capability", (int)info.compute_capability,
                         "sm_count", (int)info.sm_count, "driver_version", (int)info.driver_version, "runtime_version",
                         (int)info.runtime_version, "total_memory_bytes", (long long)info.total_memory_bytes,
                         "l2_bytes", (long long)info.l2_bytes, "usable", info.usable ? Py_True : Py_False,
                         "programmatic_launch", info.programmatic_launch ? Py_True : Py_False);
}

/* device.c: see device.h. Device memory is a capsule: whoever holds it keeps the memory, and it is freed once, in the
 * order of the legacy default stream, when the last holder lets go. */
#include "device.h"

#include <stdlib.h>
#include <string.h>

#include "base/nesting.h"
#include "base/refusals.h"
#include "convert/buffers.h"
#include "frameworks/dlpack.h"
#include "frameworks/views.h"

/* ---- memory ----------------------------------------------------------------------------------------------------- */

static const char memory_name[] = "minivllm.device_memory";

static void free_memory(PyObject *capsule) {
    mv_error error; /* a destructor has nobody to tell */
    const int32_t device = (int32_t)(intptr_t)PyCapsule_GetContext(capsule);
    (void)mv_cuda_free(device, PyCapsule_GetPointer(capsule, memory_name), &error);
}

/* _allocate(device, bytes) -> memory */
PyObject *py_allocate(PyObject *module, PyObject *args) {
    int device;
    Py_ssize_t bytes;
    void *data;
    mv_error error;
    (void)module;
    if (!PyArg_ParseTuple(args, "in", &device, &bytes)) return NULL;
    if (bytes < 0) return PyErr_Format(PyExc_ValueError, "_allocate: %zd bytes", bytes);
    if (!check_status(mv_cuda_malloc(device, (size_t)bytes, &data, &error), &error)) return NULL;
    PyObject *memory = PyCapsule_New(data, memory_name, free_memory);
    if (!memory || PyCapsule_SetContext(memory, (void *)(intptr_t)device) < 0) {
        if (!memory) (void)mv_cuda_free(device, data, &error);
        Py_CLEAR(memory);
    }
    return memory;
}

/* _address(memory) -> int */
PyObject *py_address(PyObject *module, PyObject *memory) {
    void *data = PyCapsule_GetPointer(memory, memory_name);
    (void)module;
    return data ? PyLong_FromVoidPtr(data) : NULL;
}

/* ---- copies ----------------------------------------------------------------------------------------------------- */

static PyObject *copy(PyObject *args, bool to_host) {
    int device;
    unsigned long long address, stream;
    PyObject *host;
    Py_buffer buffer;
    mv_error error;
    mv_status status;
    if (!PyArg_ParseTuple(args, "iKOK", &device, &address, &host, &stream)) return NULL;
    if (PyObject_GetBuffer(host, &buffer, to_host ? PyBUF_WRITABLE : PyBUF_SIMPLE) < 0) return NULL;
    void *const there = (void *)(uintptr_t)address;
    Py_BEGIN_ALLOW_THREADS status = mv_cuda_copy(device, to_host ? buffer.buf : there, to_host ? there : buffer.buf,
                                                 (size_t)buffer.len, (void *)(uintptr_t)stream, &error);
    Py_END_ALLOW_THREADS PyBuffer_Release(&buffer);
    if (!check_status(status, &error)) return NULL;
    Py_RETURN_NONE;
}

/* _copy_from_host(device, address, host buffer, stream) */
PyObject *py_copy_from_host(PyObject *module, PyObject *args) {
    (void)module;
    return copy(args, false);
}

/* _copy_to_host(device, address, writable host buffer, stream) */
PyObject *py_copy_to_host(PyObject *module, PyObject *args) {
    (void)module;
    return copy(args, true);
}

/* _stream_wait(device, waiting, producing) */
PyObject *py_stream_wait(PyObject *module, PyObject *args) {
    int device;
    unsigned long long waiting, producing;
    mv_error error;
    (void)module;
    if (!PyArg_ParseTuple(args, "iKK", &device, &waiting, &producing)) return NULL;
    const mv_status status =
        mv_cuda_stream_wait(device, (void *)(uintptr_t)waiting, (void *)(uintptr_t)producing, &error);
    if (!check_status(status, &error)) return NULL;
    Py_RETURN_NONE;
}

/* ---- DLPack export ---------------------------------------------------------------------------------------------- */

/* Both forms of an export in one allocation; the one that was asked for is used. */
typedef struct {
    dl_managed plain;
    dl_managed_versioned versioned;
    PyObject *owner;
    int64_t sizes[]; /* shape, then strides */
} exported;

/* May run on any thread, also after the interpreter is gone. */
static void drop(exported *e) {
    if (Py_IsInitialized()) {
        const PyGILState_STATE gil = PyGILState_Ensure();
        Py_DECREF(e->owner);
        PyGILState_Release(gil);
    }
    free(e);
}

static void drop_plain(dl_managed *self) { drop(self->owner); }
static void drop_versioned(dl_managed_versioned *self) { drop(self->owner); }

/* A capsule that nobody consumed still owns the export. */
static void destroy_capsule(PyObject *capsule) {
    if (PyCapsule_IsValid(capsule, "dltensor")) {
        dl_managed *managed = PyCapsule_GetPointer(capsule, "dltensor");
        managed->deleter(managed);
    } else if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        dl_managed_versioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        managed->deleter(managed);
    }
}

/* _to_dlpack(owner, device, address, dtype, shape, strides, versioned) -> capsule. dtype: "float32", ... */
PyObject *py_to_dlpack(PyObject *module, PyObject *args) {
    PyObject *owner, *shape, *strides;
    int device, versioned, ndim, stride_count;
    unsigned long long address;
    const char *dtype;
    int64_t sizes[2 * MAX_DIMS];
    (void)module;
    if (!PyArg_ParseTuple(args, "OiKsOOp", &owner, &device, &address, &dtype, &shape, &strides, &versioned))
        return NULL;
    if (!ints_of_tuple(shape, sizes, &ndim) || !ints_of_tuple(strides, sizes + ndim, &stride_count)) return NULL;
    if (ndim != stride_count) return PyErr_Format(PyExc_ValueError, "_to_dlpack: shape and strides differ in length");

    int found = 0;
    while (found < DTYPES && strcmp(dtype, dtype_names[found]) != 0) found++;
    if (found == DTYPES) return PyErr_Format(PyExc_ValueError, "_to_dlpack: there is no dtype %s", dtype);

    exported *e = malloc(sizeof *e + 2 * (size_t)ndim * sizeof e->sizes[0]);
    if (!e) return PyErr_NoMemory();
    memcpy(e->sizes, sizes, 2 * (size_t)ndim * sizeof sizes[0]);
    const dl_tensor tensor = {.data = (void *)(uintptr_t)address,
                              .device = {DL_CUDA, device},
                              .ndim = ndim,
                              .dtype = dl_dtypes[found],
                              .shape = e->sizes,
                              .strides = e->sizes + ndim};
    e->plain = (dl_managed){tensor, e, drop_plain};
    e->versioned = (dl_managed_versioned){{DL_MAJOR, DL_MINOR}, e, drop_versioned, 0, tensor};
    Py_INCREF(owner);
    e->owner = owner;
    PyObject *capsule = versioned ? PyCapsule_New(&e->versioned, "dltensor_versioned", destroy_capsule)
                                  : PyCapsule_New(&e->plain, "dltensor", destroy_capsule);
    if (!capsule) drop(e);
    return capsule;
}

/* ---- views ------------------------------------------------------------------------------------------------------ */

static const char export_name[] = "minivllm.dlpack_export";

static void give_back(PyObject *capsule) {
    tensor t;
    t.managed = PyCapsule_GetPointer(capsule, export_name);
    t.versioned = PyCapsule_GetContext(capsule) != NULL;
    release_dlpack(&t);
}

/* What keeps the elements alive: the DLPack export, or else the object. */
static PyObject *keeper_of(tensor *t) {
    if (!t->managed) return Py_NewRef(t->keeper ? t->keeper : t->object);
    PyObject *keeper = PyCapsule_New(t->managed, export_name, give_back);
    if (keeper && PyCapsule_SetContext(keeper, t->versioned ? keeper : NULL) == 0) t->managed = NULL;
    return keeper;
}

static bool check_size(call *c, const mv_view *view) {
    return mv_is_addressable(view) ||
           refuse(c, tensor_of(c, view), PyExc_ValueError, "has a shape and strides that reach past all memory");
}

static PyObject *device_text(const mv_view *view) {
    return view->device.kind == MV_CPU ? PyUnicode_FromString("cpu")
                                       : PyUnicode_FromFormat("cuda:%d", (int)view->device.index);
}

/* _kind(object) -> (dtype, device). No stream waits for another, so a CUDA graph may be captured meanwhile. */
PyObject *py_kind(PyObject *module, PyObject *object) {
    PyObject *device = NULL, *result = NULL;
    mv_view view = {0};
    call c;
    begin_call(&c, module, "_kind");
    c.may_hand_over = false;
    if (check_stack(&c) && take_tensor(&c, "array", -1, object, &view)) device = device_text(&view);
    if (device) result = Py_BuildValue("(sN)", dtype_names[view.dtype], device);
    end_call(&c);
    return result;
}

/* _view(object) -> (address, shape, strides in elements, dtype, device, read_only, keeper) */
PyObject *py_view(PyObject *module, PyObject *object) {
    PyObject *result = NULL;
    mv_view view = {0};
    call c;
    begin_call(&c, module, "DeviceArray.from_dlpack");
    c.may_hand_over = false;
    c.streams_of = &device_array_framework; /* whose stream waits for the tensor's */
    if (check_stack(&c) && take_tensor(&c, "array", -1, object, &view) && settle(&c) && check_size(&c, &view)) {
        tensor *t = &c.tensors[0];
        if (!view.strides) contiguous_strides(view.ndim, t->shape, t->strides);
        PyObject *shape = shape_tuple(view.ndim, t->shape), *strides = shape_tuple(view.ndim, t->strides);
        PyObject *device = device_text(&view);
        PyObject *keeper = shape && strides && device ? keeper_of(t) : NULL;
        if (keeper)
            result = Py_BuildValue("(KOOsOOO)", (unsigned long long)(uintptr_t)view.data, shape, strides,
                                   dtype_names[view.dtype], device, view.read_only ? Py_True : Py_False, keeper);
        Py_XDECREF(keeper);
        Py_XDECREF(device);
        Py_XDECREF(strides);
        Py_XDECREF(shape);
    }
    end_call(&c);
    return result;
}

/* _empty(like, shape) -> a new array of like's framework, device and dtype */
PyObject *py_empty(PyObject *module, PyObject *args) {
    PyObject *like, *shape, *result = NULL;
    int64_t sizes[MAX_DIMS];
    int ndim;
    mv_view view = {0};
    if (!PyArg_ParseTuple(args, "OO", &like, &shape) || !ints_of_tuple(shape, sizes, &ndim)) return NULL;
    call c;
    begin_call(&c, module, "_empty");
    c.may_hand_over = false;
    if (check_stack(&c) && take_tensor(&c, "like", -1, like, &view)) {
        const tensor *t = &c.tensors[0];
        const framework *from = t->kind.framework;
        tensor *made = add_fresh_tensor(&c, "result", t, NULL);
        memcpy(made->shape, sizes, (size_t)ndim * sizeof sizes[0]);
        plan_fresh_tensor(made, t, view.dtype, ndim);
        if (from->empty(&c, t, made)) {
            if (from->finish) {
                result = from->finish(&c, t, made);
            } else {
                result = made->object;
                Py_INCREF(result);
            }
        }
    }
    end_call(&c);
    return result;
}

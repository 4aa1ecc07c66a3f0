/* dlpack.c: any object with __dlpack__, and types with the C exchange API whose framework we do not know.
 *
 * Capsules come in two forms; what comes back decides, whatever was asked for. A consumed capsule is renamed, and from
 * then on its deleter is ours to call, exactly once, at the end of the call. */
#include "dlpack.h"

#include <string.h>

#include "../base/refusals.h"
#include "plain.h"
#include "slices.h"
#include "views.h"

void release_dlpack(tensor *t) {
    if (t->versioned) {
        dl_managed_versioned *managed = t->managed;
        if (managed->deleter) managed->deleter(managed);
    } else {
        dl_managed *managed = t->managed;
        if (managed->deleter) managed->deleter(managed);
    }
    t->managed = NULL;
}

static bool view_of_capsule(call *c, tensor *t, PyObject *capsule) {
    t->release = release_dlpack;
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        dl_managed_versioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        if (PyCapsule_SetName(capsule, "used_dltensor_versioned") < 0) return false;
        t->managed = managed;
        t->versioned = true;
        if (managed->version.major != DL_MAJOR) /* then only the deleter's place is known */
            return refuse(c, t, PyExc_BufferError, "was exported as DLPack version %u, expected %d",
                          (unsigned)managed->version.major, DL_MAJOR);
        /* A result written to a copy would be lost. */
        t->view.read_only = (managed->flags & (DL_READ_ONLY | DL_IS_COPIED)) != 0;
        return view_of_dl_tensor(c, t, &managed->tensor);
    }
    if (PyCapsule_IsValid(capsule, "dltensor")) {
        dl_managed *managed = PyCapsule_GetPointer(capsule, "dltensor");
        if (PyCapsule_SetName(capsule, "used_dltensor") < 0) return false;
        t->managed = managed;
        t->versioned = false;
        return view_of_dl_tensor(c, t, &managed->tensor);
    }
    return refuse(c, t, PyExc_BufferError,
                  "has a __dlpack__ that gave %R, expected a capsule named \"dltensor\" or "
                  "\"dltensor_versioned\"",
                  capsule);
}

bool view_of_dlpack(call *c, tensor *t, PyObject *stream) {
    PyObject *export = PyObject_GetAttr(t->object, c->state->names[NAME_DLPACK]);
    PyObject *none = PyTuple_New(0);
    PyObject *options = stream ? Py_BuildValue("{sO}", "stream", stream) : PyDict_New();
    PyObject *version = Py_BuildValue("(ii)", DL_MAJOR, DL_MINOR);
    PyObject *capsule = NULL;
    if (export && none && options && version && PyDict_SetItemString(options, "max_version", version) == 0) {
        capsule = PyObject_Call(export, none, options);
        if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) { /* older than max_version */
            PyErr_Clear();
            if (PyDict_DelItemString(options, "max_version") == 0) capsule = PyObject_Call(export, none, options);
        }
    }
    Py_XDECREF(version);
    Py_XDECREF(options);
    Py_XDECREF(none);
    Py_XDECREF(export);
    if (!capsule) return refuse_because(c, t, PyExc_BufferError, "cannot be read through its __dlpack__");
    const bool ok = view_of_capsule(c, t, capsule);
    Py_DECREF(capsule);
    return ok;
}

/* ---- objects with __dlpack__ ------------------------------------------------------------------------------------ */

static bool is_on_cuda(call *c, tensor *t, bool *answer) {
    PyObject *device = PyObject_CallMethodObjArgs(t->object, c->state->names[NAME_DLPACK_DEVICE], NULL);
    int type = 0, id;
    PyObject *plain = device ? PySequence_Tuple(device) : NULL;
    const bool ok = plain && PyArg_ParseTuple(plain, "ii", &type, &id);
    Py_XDECREF(plain);
    Py_XDECREF(device);
    *answer = type == DL_CUDA || type == DL_CUDA_MANAGED;
    return ok || refuse_because(c, t, PyExc_BufferError, "does not say where it is (__dlpack_device__)");
}

/* The exporter makes our stream wait for its data. */
static bool export_to_stream(call *c, tensor *t) {
    bool on_cuda;
    if (!is_on_cuda(c, t, &on_cuda)) return false;
    if (!on_cuda) return view_of_dlpack(c, t, NULL);
    PyObject *stream = PyLong_FromVoidPtr(c->stream ? c->stream : (void *)1);
    const bool ok = stream && view_of_dlpack(c, t, stream);
    Py_XDECREF(stream);
    return ok;
}

/* The export is given back at the end of the call, and the exporter may then reuse the memory: so we must be done. */
static bool dlpack_view(call *c, tensor *t) {
    if (!export_to_stream(c, t)) return false;
    c->synchronize = c->synchronize || t->view.device.kind == MV_CUDA;
    return true;
}

const framework dlpack_framework = {
    .name = "DLPack", .view = dlpack_view, .empty = plain_empty, .scratch = plain_scratch, .split = split_by_slices};

/* DeviceArray frees its memory in the order of the legacy default stream. */
static bool device_array_view(call *c, tensor *t) {
    if (!export_to_stream(c, t)) return false;
    c->synchronize = c->synchronize || c->stream;
    return true;
}

static PyObject *device_array_split(call *c, const tensor *like, const tensor *out, const head_counts *n) {
    (void)c, (void)like;
    return PyObject_CallMethod(out->object, "_split_heads", "LLLL", (long long)n->heads[0], (long long)n->heads[1],
                               (long long)n->heads[2], (long long)n->head_dim);
}

const framework device_array_framework = {.name = "DeviceArray",
                                          .view = device_array_view,
                                          .empty = plain_empty,
                                          .scratch = plain_scratch,
                                          .split = device_array_split};

/* ---- types with the exchange API -------------------------------------------------------------------------------- */

static bool exchange_view(call *c, tensor *t) {
    dl_tensor borrowed;
    if (t->kind.api->borrow_from_object(t->object, &borrowed) != 0)
        return refuse_because(c, t, PyExc_BufferError, "cannot be read");
    return view_of_dl_tensor(c, t, &borrowed);
}

static bool exchange_stream(call *c, const tensor *t, void **stream) {
    if (t->kind.api->current_stream(DL_CUDA, t->view.device.index, stream) == 0) return true;
    return refuse_because(c, t, PyExc_RuntimeError, "has no current stream");
}

static void set_error(void *context, const char *kind, const char *message) {
    PyErr_Format(context, "%s: %s", kind, message);
}

static bool exchange_new(const tensor *like, dl_dtype dtype, int ndim, const int64_t *shape, tensor *made) {
    int64_t sizes[MAX_DIMS], strides[MAX_DIMS];
    memcpy(sizes, shape, (size_t)ndim * sizeof sizes[0]);
    contiguous_strides(ndim, shape, strides);
    const bool cuda = like->view.device.kind == MV_CUDA;
    dl_tensor prototype = {NULL, {cuda ? DL_CUDA : DL_CPU, like->view.device.index}, ndim, dtype, sizes, strides, 0};
    dl_managed_versioned *managed = NULL;
    void *object = NULL;
    if (like->kind.api->allocate(&prototype, &managed, PyExc_MemoryError, set_error) != 0) return false;
    made->view.data = managed->tensor.data;
    if (like->kind.api->owned_to_object(managed, &object) == 0) made->object = object;
    return made->object != NULL;
}

static bool exchange_empty(call *c, const tensor *like, tensor *made) {
    (void)c;
    return exchange_new(like, dl_dtypes[made->view.dtype], made->view.ndim, made->shape, made);
}

static bool exchange_scratch(call *c, const tensor *like, size_t bytes, tensor *made) {
    const int64_t size = (int64_t)bytes;
    (void)c;
    return exchange_new(like, (dl_dtype){DL_UINT, 8, 1}, 1, &size, made);
}

const framework exchange_framework = {.name = "DLPack exchange API",
                                      .view = exchange_view,
                                      .stream = exchange_stream,
                                      .empty = exchange_empty,
                                      .scratch = exchange_scratch,
                                      .split = split_by_slices};

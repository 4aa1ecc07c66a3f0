/* torch_results.c: see torch_results.h. All of it is memory of torch's own allocator, in torch's own storages: what was
 * wrapped from elsewhere would ignore record_stream. A fresh output stays a handle until the op has run, and only then
 * becomes an object, or three: objects are what costs. */
#include "torch_results.h"

#include <string.h>

#include "slices.h"
#include "torch_c.h"

/* ---- from C ----------------------------------------------------------------------------------------------------- */

/* False, without an error set, where torch cannot: torch.empty then says why. dtype: a mv_dtype, or DTYPES: uint8. */
static bool make_handle(int dtype, mv_device device, int ndim, const int64_t *shape, const int64_t *strides,
                        tensor *made) {
    const torch_c *torch = torch_c_functions();
    torch_handle *handle;
    if (!torch) return false;
    if (torch->empty(ndim, shape, strides, torch->dtypes[dtype], device.kind == MV_CPU ? TORCH_CPU : TORCH_CUDA,
                     device.index, &handle))
        return false;
    if (torch->data(handle, &made->view.data) == 0 && made->view.data) {
        made->unfinished = handle;
        return true;
    }
    torch->drop(handle);
    return false;
}

void torch_drop(void *unfinished) { torch_c_functions()->drop(unfinished); }

/* A part of a packed tensor; offset: from the beginning of `packed`. Strides and offset count elements. NULL in it: an
 * exception is set. */
typedef torch_returned make_part(const torch_c *torch, torch_handle *packed, torch_numbers shape, torch_numbers strides,
                                 int64_t offset);

/* Nobody else holds a fresh packed tensor, so its parts need no record of being parts of one. */
static torch_returned part_of_fresh(const torch_c *torch, torch_handle *packed, torch_numbers shape,
                                    torch_numbers strides, int64_t offset) {
    return torch->share(packed, shape, strides, offset);
}

/* While no gradients are recorded: a write to the part is one to the whole, and the other way round. */
static torch_returned part_of_given(const torch_c *torch, torch_handle *packed, torch_numbers shape,
                                    torch_numbers strides, int64_t offset) {
    torch_returned part = torch->share(packed, shape, strides, offset);
    const torch_handle *handle = (const torch_handle *)&part;
    const torch_version *version = torch->version(packed);
    if (version->counter && torch->version(handle)->counter) torch->set_version(handle, version);
    return part;
}

/* While they are: what the whole becomes part of, its views do too. */
static torch_returned view_of_given(const torch_c *torch, torch_handle *packed, torch_numbers shape,
                                    torch_numbers strides, int64_t offset) {
    torch_optional begin = {0, true};
    if (torch->offset(packed, &begin.value) != 0) {
        PyErr_SetString(PyExc_RuntimeError,
                        "minivllm: torch could not tell the storage offset of out; its reason is on stderr");
        return (torch_returned){NULL, {NULL, NULL}};
    }
    begin.value += offset;
    return torch->view(packed, shape, strides, &begin);
}

/* (q, k, v) */
static PyObject *make_parts(make_part *make, torch_handle *packed, const tensor *out, const head_counts *n) {
    int64_t shape[MAX_DIMS + 1], strides[MAX_DIMS + 1];
    const int lead = out->view.ndim - (out->fresh ? 2 : 1);
    memcpy(shape, out->shape, (size_t)lead * sizeof shape[0]);
    memcpy(strides, out->strides, (size_t)lead * sizeof strides[0]);
    shape[lead + 1] = strides[lead] = n->head_dim;
    strides[lead + 1] = 1;
    const torch_c *torch = torch_c_functions();
    const size_t dims = (size_t)lead + 2;
    PyObject *parts = PyTuple_New(3);
    int64_t offset = 0;
    for (int i = 0; parts && i < 3; i++) {
        shape[lead] = n->heads[i];
        torch_returned made = make(torch, packed, (torch_numbers){shape, dims}, (torch_numbers){strides, dims}, offset);
        PyObject *part = made.tensor ? torch->object((torch_handle *)&made) : NULL;
        if (!part || PyTuple_SetItem(parts, i, part) < 0) Py_CLEAR(parts);
        offset += n->heads[i] * n->head_dim;
    }
    return parts;
}

/* ---- through Python --------------------------------------------------------------------------------------------- */

/* dtype=, device= for torch.empty, of the same dtypes. Borrowed. */
static PyObject *options_for(module_state *state, int dtype, mv_device device) {
    const int place = device.kind == MV_CPU ? 0 : 1 + device.index;
    if (place > MAX_CUDA_DEVICES)
        return PyErr_Format(PyExc_RuntimeError, "minivllm: only the first %d GPUs can be used", MAX_CUDA_DEVICES);
    PyObject *made = atomic_load_explicit(&state->torch_options[dtype][place], memory_order_acquire);
    if (made) return made;
    PyObject *type = known(state, TORCH_DTYPES + dtype);
    PyObject *make_device = known(state, TORCH_DEVICE);
    if (!type || !make_device) return NULL;
    PyObject *where = device.kind == MV_CPU ? PyObject_CallFunction(make_device, "s", "cpu")
                                            : PyObject_CallFunction(make_device, "si", "cuda", (int)device.index);
    PyObject *options = where ? Py_BuildValue("{sOsO}", "dtype", type, "device", where) : NULL;
    Py_XDECREF(where);
    return keep_first(&state->torch_options[dtype][place], options);
}

static PyObject *call_empty(call *c, int dtype, mv_device device, int ndim, const int64_t *shape) {
    PyObject *empty = known(c->state, TORCH_EMPTY);
    PyObject *options = empty ? options_for(c->state, dtype, device) : NULL;
    PyObject *sizes = options ? shape_tuple(ndim, shape) : NULL;
    PyObject *arguments = sizes ? PyTuple_Pack(1, sizes) : NULL;
    PyObject *result = arguments ? PyObject_Call(empty, arguments, options) : NULL;
    Py_XDECREF(arguments);
    Py_XDECREF(sizes);
    return result;
}

/* Nobody else holds a fresh packed buffer, so its parts need no autograd record of being views of one tensor. */
static PyObject *call_split(call *c, const tensor *out, const head_counts *n) {
    PyObject *base = out->object;
    if (out->fresh) {
        Py_INCREF(base);
    } else {
        PyObject *shape = split_shape(out, n);
        base = shape ? PyObject_CallMethodObjArgs(base, c->state->names[NAME_VIEW], shape, NULL) : NULL;
        Py_XDECREF(shape);
    }
    PyObject *function = known(c->state, out->fresh ? TORCH_SPLIT_FRESH : TORCH_SPLIT);
    PyObject *parts = NULL;
    if (base && function) {
        PyObject *sizes = shape_tuple(3, n->heads);
        PyObject *dim = PyLong_FromLong(-2);
        if (sizes && dim) parts = PyObject_CallFunctionObjArgs(function, base, sizes, dim, NULL);
        Py_XDECREF(dim);
        Py_XDECREF(sizes);
    }
    Py_XDECREF(base);
    return parts;
}

/* ---- either ----------------------------------------------------------------------------------------------------- */

bool torch_empty(call *c, const tensor *like, tensor *made) {
    const int dtype = (int)made->view.dtype, ndim = made->view.ndim;
    if (make_handle(dtype, like->view.device, ndim, made->shape, made->strides, made)) return true;
    made->object = call_empty(c, dtype, like->view.device, ndim, made->shape);
    return made->object != NULL;
}

bool torch_scratch(call *c, const tensor *like, size_t bytes, tensor *made) {
    const int64_t size = (int64_t)bytes, stride = 1;
    const int dtype = DTYPES;
    if (make_handle(dtype, like->view.device, 1, &size, &stride, made)) return true;
    made->object = call_empty(c, dtype, like->view.device, 1, &size);
    PyObject *pointer = made->object ? PyObject_CallMethod(made->object, "data_ptr", NULL) : NULL;
    if (pointer) made->view.data = PyLong_AsVoidPtr(pointer);
    Py_XDECREF(pointer);
    return made->view.data != NULL;
}

PyObject *torch_finish(call *c, const tensor *like, tensor *made) {
    (void)c, (void)like;
    if (made->unfinished) return torch_c_functions()->object(made->unfinished);
    Py_INCREF(made->object);
    return made->object;
}

PyObject *torch_split(call *c, const tensor *like, const tensor *out, const head_counts *n) {
    const torch_c *torch = torch_c_functions();
    torch_handle *packed = out->unfinished;
    (void)like;
    if (packed) return make_parts(part_of_fresh, packed, out, n);
    const bool exact = (PyObject *)Py_TYPE(out->object) == known(c->state, TORCH_TENSOR);
    const bool knows_modes = c->torch_modes == TORCH_GRADIENTS || c->torch_modes == TORCH_NO_GRADIENTS;
    if (!torch || !exact || !knows_modes || !out->view.strides)
        return out->fresh || out->kind.framework->written(c, out) ? call_split(c, out, n) : NULL;
    void *const tensor = torch_tensor_of(c->state, out->object);
    if (!tensor) return NULL;
    packed = (torch_handle *)&tensor;
    torch_note_write(torch, packed);
    return make_parts(c->torch_modes == TORCH_GRADIENTS ? view_of_given : part_of_given, packed, out, n);
}

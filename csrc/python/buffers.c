/* buffers.c: from any object to an mv_view.
 *
 * A type is classified once and remembered: looking up an attribute that a type lacks costs more than a whole call.
 * No framework is imported for it: an object of a framework that is not in sys.modules cannot exist. */
#include "buffers.h"

#include <string.h>

#include "nesting.h"
#include "steps.h"

/* ---- classification --------------------------------------------------------------------------------------------- */

static const struct {
    const char *module, *type;
    const framework *framework;
} known_types[] = {
    {"torch", "Tensor", &torch_framework},         {"numpy.ma", "MaskedArray", &masked_framework},
    {"numpy", "ndarray", &numpy_framework},        {"minivllm.device_array", "DeviceArray", &device_array_framework},
    {"cupy", "ndarray", &cupy_framework},          {"jax", "Array", &jax_framework},
    {"jax.core", "Tracer", &jax_tracer_framework},
};

PyObject *loaded(const char *module_name, const char *attribute) {
    PyObject *name = PyUnicode_FromString(module_name);
    PyObject *module = name ? PyImport_GetModule(name) : NULL;
    PyObject *value = module ? PyObject_GetAttrString(module, attribute) : NULL;
    Py_XDECREF(module);
    Py_XDECREF(name);
    PyErr_Clear();
    return value;
}

/* 1 when `object` is of the type module.name, 0 when not, -1 on an error. */
static int is_of_type(PyObject *object, const char *module_name, const char *type_name) {
    PyObject *type = loaded(module_name, type_name);
    const int answer = type ? PyObject_IsSubclass((PyObject *)Py_TYPE(object), type) : 0;
    Py_XDECREF(type);
    return answer;
}

/* torch has the exchange API since 2.10. Add-ons put one into older versions, not always of the ABI that it claims. */
static bool has_native_exchange(const framework *found) {
    if (found != &torch_framework) return true;
    PyObject *native = loaded("torch._C", "_dlpack_exchange_api");
    Py_XDECREF(native);
    return native != NULL;
}

static const dl_exchange_api *exchange_api_of(PyTypeObject *type) {
    PyObject *capsule = PyObject_GetAttrString((PyObject *)type, "__dlpack_c_exchange_api__");
    const dl_exchange_header *header = NULL;
    if (capsule && PyCapsule_IsValid(capsule, "dlpack_exchange_api"))
        header = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    PyErr_Clear();
    Py_XDECREF(capsule);
    while (header && header->version.major != DL_MAJOR) header = header->previous;
    return (const dl_exchange_api *)header;
}

static bool has(PyObject *object, PyObject *name) {
    PyObject *value = PyObject_GetAttr(object, name);
    if (!value) PyErr_Clear();
    Py_XDECREF(value);
    return value != NULL;
}

/* Fills framework and api; *cacheable: they follow from the type alone. NULL framework: no tensor. */
static bool classify(call *c, PyObject *object, type_kind *found, bool *cacheable) {
    PyTypeObject *type = Py_TYPE(object);
    *found = (type_kind){.framework = NULL, .api = exchange_api_of(type)};
    *cacheable = true;
    for (size_t i = 0; i < sizeof known_types / sizeof known_types[0]; i++) {
        const int is = is_of_type(object, known_types[i].module, known_types[i].type);
        if (is < 0) return false;
        if (is) {
            found->framework = known_types[i].framework;
            if (!has_native_exchange(found->framework)) found->api = NULL;
            const int overrides = found->framework == &torch_framework ? torch_overrides(c->state, type) : 0;
            found->overrides = overrides == 1;
            return overrides >= 0;
        }
    }
    PyObject *const *names = c->state->names;
    if (found->api && found->api->borrow_from_object) {
        found->framework = &exchange_framework;
    } else if (has((PyObject *)type, names[NAME_DLPACK])) {
        found->framework = &dlpack_framework;
    } else {
        *cacheable = has((PyObject *)type, names[NAME_CUDA_ARRAY_INTERFACE]);
        if (!PyType_Check(object) && (*cacheable || has(object, names[NAME_CUDA_ARRAY_INTERFACE])))
            found->framework = &cuda_array_framework;
    }
    return true;
}

/* A slot is reserved, filled and then published, so readers need no lock; two threads may fill two for one type. */
static void remember(module_state *state, PyTypeObject *type, type_kind kind) {
    if (atomic_load(&state->types_used) >= MAX_TYPES) return;
    const int i = atomic_fetch_add(&state->types_used, 1);
    if (i >= MAX_TYPES) return;
    Py_INCREF((PyObject *)type); /* the address of a type that died could come back as another one's */
    state->types[i].kind = kind;
    atomic_store_explicit(&state->types[i].type, type, memory_order_release);
}

static bool find_framework(call *c, tensor *t) {
    PyTypeObject *type = Py_TYPE(t->object);
    module_state *state = c->state;
    for (int i = 0; i < MAX_TYPES; i++) {
        const type_slot *slot = &state->types[i];
        PyTypeObject *known_type = atomic_load_explicit(&slot->type, memory_order_acquire);
        if (!known_type) break;
        if (known_type == type) {
            t->kind = slot->kind;
            return true;
        }
    }
    bool cacheable;
    if (!classify(c, t->object, &t->kind, &cacheable)) return false;
    if (!t->kind.framework) return refuse_object(c, t);
    if (cacheable) remember(state, type, t->kind);
    return true;
}

/* ---- views ------------------------------------------------------------------------------------------------------ */

const char *const dtype_names[] = {"float32", "float16", "bfloat16"};

static int64_t itemsize_of(mv_dtype dtype) { return dtype == MV_F32 ? 4 : 2; }

bool check_view(call *c, tensor *t) {
    bool empty = false;
    for (int d = 0; d < t->view.ndim; d++) {
        if (t->shape[d] < 0) return refuse(c, t, PyExc_BufferError, "was exported with a negative size");
        empty = empty || t->shape[d] == 0;
    }
    if (empty) { /* nothing to step over, and NumPy's strides may be zero then */
        t->view.strides = NULL;
        return true;
    }
    if (!t->view.data)
        return refuse(c, t, PyExc_BufferError, "has no data: its exporter gave a null pointer for its elements");
    const int itemsize = (int)itemsize_of(t->view.dtype);
    if ((uintptr_t)t->view.data % (uintptr_t)itemsize != 0)
        return refuse(c, t, PyExc_ValueError,
                      "starts at an address that is no multiple of its %d-byte elements; pass "
                      "a copy",
                      itemsize);
    return true;
}

bool strides_from_bytes(call *c, tensor *t) {
    const int64_t itemsize = itemsize_of(t->view.dtype);
    bool empty = false;
    for (int d = 0; d < t->view.ndim; d++) empty = empty || t->shape[d] == 0;
    for (int d = 0; d < t->view.ndim; d++) {
        if (t->shape[d] > 1 && !empty && t->strides[d] % itemsize != 0)
            return refuse(c, t, PyExc_ValueError,
                          "has a stride of %lld bytes in dimension %d, expected a multiple of "
                          "its %d-byte elements; pass a contiguous copy",
                          (long long)t->strides[d], d, (int)itemsize);
        t->strides[d] /= itemsize;
    }
    return true;
}

static const char *dl_dtype_text(dl_dtype dtype, char *text, size_t size) {
    static const char *const kinds[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
    const bool small = dtype.code >= sizeof kinds / sizeof kinds[0]; /* the many floats of 8, 6 and 4 bits */
    PyOS_snprintf(text, size, dtype.lanes == 1 ? "dtype %s%d" : "dtype %s%d in vectors of %d",
                  small ? "float" : kinds[dtype.code], (int)dtype.bits, (int)dtype.lanes);
    return text;
}

bool view_of_dl_tensor(call *c, tensor *t, const dl_tensor *source) {
    mv_view *view = &t->view;
    switch (source->device.type) {
    case DL_CPU:
    case DL_CUDA_HOST: /* pinned */ view->device = (mv_device){MV_CPU, 0}; break;
    case DL_CUDA:
    case DL_CUDA_MANAGED: view->device = (mv_device){MV_CUDA, source->device.id}; break;
    default:
        return refuse(c, t, PyExc_ValueError, "is on a device of DLPack type %d, expected the CPU or a CUDA device",
                      (int)source->device.type);
    }
    const dl_dtype dtype = source->dtype;
    if (dtype.code == DL_FLOAT && dtype.bits == 32 && dtype.lanes == 1)
        view->dtype = MV_F32;
    else if (dtype.code == DL_FLOAT && dtype.bits == 16 && dtype.lanes == 1)
        view->dtype = MV_F16;
    else if (dtype.code == DL_BFLOAT && dtype.bits == 16 && dtype.lanes == 1)
        view->dtype = MV_BF16;
    else {
        char text[64];
        return refuse_dtype(c, t, dl_dtype_text(dtype, text, sizeof text));
    }
    if (source->ndim > 0 && !source->shape) return refuse(c, t, PyExc_BufferError, "was exported without a shape");
    if (source->ndim < 0 || source->ndim > MAX_DIMS)
        return refuse(c, t, PyExc_ValueError, "has %d dimensions, expected at most %d", (int)source->ndim, MAX_DIMS);
    view->ndim = source->ndim;
    for (int d = 0; d < source->ndim; d++) {
        t->shape[d] = source->shape[d];
        if (source->strides) t->strides[d] = source->strides[d];
    }
    view->strides = source->strides ? t->strides : NULL;
    view->data = source->data ? (void *)((uintptr_t)source->data + source->byte_offset) : NULL;
    return check_view(c, t);
}

/* ---- streams ---------------------------------------------------------------------------------------------------- */

/* The legacy default stream has two names. */
static void *plain_stream(void *stream) { return stream == (void *)1 ? NULL : stream; }

/* The first tensor on a GPU decides the stream; later ones that live on another stream are waited for. */
static bool join_stream(call *c, tensor *t) {
    const framework *from = t->kind.framework;
    void *stream = NULL;
    if (from == c->streams_of && !t->has_producer) return true;
    if (!t->has_producer && from->stream) {
        if (!from->stream(c, t, &stream)) return false;
        t->producer = stream;
        t->has_producer = c->streams_of != NULL;
    }
    if (!c->streams_of) {
        c->streams_of = from;
        c->stream = plain_stream(stream);
    }
    if (c->device < 0) c->device = t->view.device.index;
    t->producer = plain_stream(t->producer);
    t->has_producer = t->has_producer && t->producer != c->stream && t->view.device.index == c->device;
    mv_error error;
    return !t->has_producer || check_status(mv_cuda_stream_wait(c->device, c->stream, t->producer, &error), &error);
}

bool settle(call *c) {
    mv_error error;
    for (int i = 0; i < c->count; i++) {
        const tensor *t = &c->tensors[i];
        if (t->has_producer && !check_status(mv_cuda_stream_wait(c->device, t->producer, c->stream, &error), &error))
            return false;
    }
    if (!c->synchronize || !c->streams_of) return true;
    mv_status status;
    Py_BEGIN_ALLOW_THREADS status = mv_cuda_synchronize(c->device, c->stream, &error);
    Py_END_ALLOW_THREADS return check_status(status, &error);
}

/* ---- one tensor, one call --------------------------------------------------------------------------------------- */

static tensor *add_tensor(call *c, const char *name, int member, PyObject *object, mv_view *slot) {
    tensor *t = &c->tensors[c->count++];
    Py_XINCREF(object);
    t->object = object;
    t->unfinished = NULL;
    t->name = name;
    t->member = member;
    t->slot = slot;
    t->managed = NULL;
    t->keeper = NULL;
    t->fresh = false;
    t->has_producer = false;
    t->producer = NULL;
    t->view = (mv_view){.shape = t->shape, .strides = t->strides};
    return t;
}

tensor *add_fresh_tensor(call *c, const char *name, const tensor *like, mv_view *slot) {
    tensor *t = add_tensor(c, name, -1, NULL, slot);
    t->kind = like->kind;
    t->fresh = true;
    return t;
}

static bool read_tensor(call *c, tensor *t) {
    if (!find_framework(c, t) || !t->kind.framework->view(c, t)) return false;
    if (t->view.device.kind == MV_CUDA && !join_stream(c, t)) return false;
    *t->slot = t->view;
    return true;
}

bool view_fresh_tensor(call *c, tensor *t, const tensor *like, int ndim, const int64_t *shape) {
    if (!t->view.data) {
        c->may_hand_over = false;
        return read_tensor(c, t);
    }
    memcpy(t->shape, shape, (size_t)ndim * sizeof shape[0]);
    contiguous_strides(ndim, shape, t->strides);
    t->view.ndim = ndim;
    t->view.dtype = like->view.dtype;
    t->view.device = like->view.device;
    *t->slot = t->view;
    return true;
}

bool take_tensor(call *c, const char *name, int member, PyObject *object, mv_view *slot) {
    return read_tensor(c, add_tensor(c, name, member, object, slot));
}

tensor *tensor_of(call *c, const mv_view *slot) {
    for (int i = 0; i < c->count; i++)
        if (c->tensors[i].slot == slot) return &c->tensors[i];
    return NULL;
}

void begin_call(call *c, PyObject *module, const char *op) {
    c->state = PyModule_GetState(module);
    c->op = op;
    c->torch_function = op;
    c->may_hand_over = true;
    c->hand_over = false;
    c->self = NULL;
    c->torch_modes = -1;
    c->result = NULL;
    c->streams_of = NULL;
    c->stream = NULL;
    c->device = -1;
    c->synchronize = false;
    c->scratch = NULL;
    c->count = 0;
    c->nested = enter_call();
    begin_steps(c);
}

void end_call(call *c) {
    PyObject *type, *value, *traceback;
    const bool failed = PyErr_Occurred() != NULL;
    if (failed) PyErr_Fetch(&type, &value, &traceback);
    PyMem_Free(c->scratch);
    for (int i = 0; i < c->count; i++) {
        tensor *t = &c->tensors[i];
        release_dlpack(t);
        if (t->unfinished) t->kind.framework->drop(t->unfinished);
        Py_XDECREF(t->keeper);
        Py_XDECREF(t->object);
    }
    if (failed) PyErr_Restore(type, value, traceback);
    if (c->hand_over) c->result = call_torch(c);
    leave_call();
    end_step(c, STEP_RETURN);
}

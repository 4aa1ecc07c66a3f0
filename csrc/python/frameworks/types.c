/* types.c: which framework a tensor is of.
 *
 * A type is classified once and remembered: looking up an attribute that a type lacks costs more than a whole call.
 * No framework is imported for it: an object of a framework that is not in sys.modules cannot exist. */
#include "types.h"

#include "../base/refusals.h"
#include "cuda_array.h"
#include "cupy.h"
#include "dlpack.h"
#include "dlpack_abi.h"
#include "jax.h"
#include "numpy.h"
#include "torch.h"

static const struct {
    const char *module, *type;
    const framework *framework;
} known_types[] = {
    {"torch", "Tensor", &torch_framework},         {"numpy.ma", "MaskedArray", &masked_framework},
    {"numpy", "ndarray", &numpy_framework},        {"minivllm.device_array", "DeviceArray", &device_array_framework},
    {"cupy", "ndarray", &cupy_framework},          {"jax", "Array", &jax_framework},
    {"jax.core", "Tracer", &jax_tracer_framework},
};

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

bool classify_tensor(call *c, tensor *t) {
    bool cacheable;
    if (!classify(c, t->object, &t->kind, &cacheable)) return false;
    if (!t->kind.framework) return refuse_object(c, t);
    if (cacheable) remember(c->state, Py_TYPE(t->object), t->kind);
    return true;
}

/* torch_c.c: see torch_c.h. */
#include "torch_c.h"

#include <dlfcn.h>
#include <string.h>

static bool find(void *library, const char *name, void *function) {
    void *const address = library ? dlsym(library, name) : NULL;
    memcpy(function, &address, sizeof address); /* ISO C has no cast from an object's address to a function's */
    return address != NULL;
}

/* A library that is loaded already, by its name in the dynamic linker's list. */
static void *loaded_library(const char *name) { return dlopen(name, RTLD_LAZY | RTLD_NOLOAD); }

static bool find_all(torch_c *found) {
    static const char *const dtypes[] = {"aoti_torch_dtype_float32", "aoti_torch_dtype_float16",
                                         "aoti_torch_dtype_bfloat16", "aoti_torch_dtype_uint8"};
    void *const core = loaded_library("libc10.so"), *const tensors = loaded_library("libtorch_cpu.so"),
                *const objects = loaded_library("libtorch_python.so");
    for (int i = 0; i < 4; i++) {
        int32_t (*dtype)(void);
        if (!find(tensors, dtypes[i], &dtype)) return false;
        found->dtypes[i] = dtype();
    }
    return find(tensors, "aoti_torch_grad_mode_is_enabled", &found->is_grad_enabled) &&
           find(core, "_ZN3c104impl20TorchDispatchModeTLS9stack_lenEv", &found->dispatch_modes) &&
           find(tensors, "_ZN5torch3jit6tracer15getTracingStateEv", &found->tracer) &&
           find(tensors, "aoti_torch_empty_strided", &found->empty) &&
           find(tensors, "aoti_torch_get_data_ptr", &found->data) &&
           find(tensors, "aoti_torch_get_storage_offset", &found->offset) &&
           find(tensors, "aoti_torch_delete_tensor_object", &found->drop) &&
           find(tensors, "_ZN5torch8inductor19_reinterpret_tensorERKN2at6TensorEN3c108ArrayRefIlEES7_l",
                &found->share) &&
           find(tensors, "_ZN2at4_ops10as_strided4callERKNS_6TensorEN3c108ArrayRefINS5_6SymIntEEES8_St8optionalIS7_E",
                &found->view) &&
           find(objects, "_Z16THPVariable_WrapON2at10TensorBaseE", &found->object) &&
           find(tensors, "_ZN5torch8autograd4impl15version_counterERKN2at6TensorE", &found->version) &&
           find(tensors, "_ZN5torch8autograd4impl19set_version_counterERKN2at6TensorERKN3c1015VariableVersionE",
                &found->set_version) &&
           find(tensors, "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE", &found->bump_version) &&
           find(tensors, "_ZN2at25compositeimplicitautograd6is_negERKNS_6TensorE", &found->is_negated);
}

const torch_c *torch_c_functions(void) {
    static torch_c functions;
    static atomic_int state; /* 0: nobody has looked; 1: somebody looks; 2: found; 3: not found */
    int seen = atomic_load_explicit(&state, memory_order_acquire);
    if (seen == 0 && atomic_compare_exchange_strong(&state, &seen, 1)) {
        seen = find_all(&functions) ? 2 : 3;
        atomic_store_explicit(&state, seen, memory_order_release);
    }
    return seen == 2 ? &functions : NULL;
}

/* object._cdata, the slow way. */
static void *ask_for_tensor(module_state *state, PyObject *object) {
    PyObject *address = PyObject_GetAttr(object, state->names[NAME_CDATA]);
    void *const tensor = address ? PyLong_AsVoidPtr(address) : NULL;
    Py_XDECREF(address);
    return tensor;
}

enum { NOT_FOUND = -1 };

/* The only word of a torch.Tensor that holds this pointer, or NOT_FOUND. */
static int word_of(module_state *state, PyObject *object, void *tensor) {
    PyObject *type = known(state, TORCH_TENSOR);
    PyObject *size = type ? PyObject_GetAttrString(type, "__basicsize__") : NULL;
    const int words = size ? (int)(PyLong_AsLong(size) / (long)sizeof(void *)) : 0;
    int found = NOT_FOUND, count = 0;
    for (int i = sizeof(PyObject) / sizeof(void *); i < words; i++) {
        if (((void *const *)(void *)object)[i] != tensor) continue;
        found = i;
        count++;
    }
    Py_XDECREF(size);
    PyErr_Clear();
    return count == 1 ? found : NOT_FOUND;
}

/* Where an object keeps the pointer is torch's own affair, so the first tensor that comes tells: its _cdata is the
 * pointer. */
void *torch_tensor_of(module_state *state, PyObject *object) {
    static atomic_int place; /* 0: nobody has looked; NOT_FOUND: each is asked */
    int word = atomic_load_explicit(&place, memory_order_relaxed);
    if (word > 0) return ((void *const *)(void *)object)[word];
    void *const tensor = ask_for_tensor(state, object);
    if (tensor && word == 0) atomic_store_explicit(&place, word_of(state, object, tensor), memory_order_relaxed);
    return tensor;
}

bool torch_version_of(const call *c, const tensor *t, long long *version) {
    PyObject *object = PyObject_GetAttr(t->object, c->state->names[NAME_VERSION]);
    *version = object ? PyLong_AsLongLong(object) : -1;
    Py_XDECREF(object);
    if (!PyErr_Occurred()) return true;
    PyErr_Clear(); /* an inference tensor says that it has none */
    return false;
}

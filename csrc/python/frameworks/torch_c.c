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
    static const char *const dtypes[] = {
        "aoti_torch_dtype_float32", "aoti_torch_dtype_float16", "aoti_torch_dtype_bfloat16", "aoti_torch_dtype_int32",
        "aoti_torch_dtype_int64",   "aoti_torch_dtype_bool",    "aoti_torch_dtype_uint8"};
    void *const core = loaded_library("libc10.so"), *const tensors = loaded_library("libtorch_cpu.so"),
                *const objects = loaded_library("libtorch_python.so");
    for (int i = 0; i <= DTYPES; i++) {
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

_Atomic(const torch_c *) torch_c_found;

/* One thread looks, once; others are served through Python meanwhile. */
const torch_c *find_torch_c(void) {
    static torch_c functions;
    static atomic_flag looked = ATOMIC_FLAG_INIT;
    if (atomic_flag_test_and_set(&looked) || !find_all(&functions)) return NULL;
    atomic_store_explicit(&torch_c_found, &functions, memory_order_release);
    return &functions;
}

/* OpenMP's own names, in the library that torch brings or was linked to. */
const mv_team *torch_team(void) {
    static mv_team team;
    static atomic_flag looked = ATOMIC_FLAG_INIT;
    static _Atomic(const mv_team *) found;
    if (!atomic_flag_test_and_set(&looked)) {
        void *const tensors = loaded_library("libtorch_cpu.so");
        if (find(tensors, "GOMP_parallel", &team.run) && find(tensors, "omp_get_thread_num", &team.number) &&
            find(tensors, "omp_get_max_threads", &team.size))
            atomic_store_explicit(&found, &team, memory_order_release);
    }
    return atomic_load_explicit(&found, memory_order_acquire);
}

/* object._cdata, the slow way. */
static void *ask_for_tensor(module_state *state, PyObject *object) {
    PyObject *address = PyObject_GetAttr(object, state->names[NAME_CDATA]);
    void *const tensor = address ? PyLong_AsVoidPtr(address) : NULL;
    Py_XDECREF(address);
    return tensor;
}

enum { NOT_FOUND = -1 };
atomic_int torch_tensor_word; /* 0: nobody has looked; NOT_FOUND: each is asked */

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
void *ask_for_torch_tensor(module_state *state, PyObject *object) {
    void *const tensor = ask_for_tensor(state, object);
    if (tensor && atomic_load_explicit(&torch_tensor_word, memory_order_relaxed) == 0)
        atomic_store_explicit(&torch_tensor_word, word_of(state, object, tensor), memory_order_relaxed);
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

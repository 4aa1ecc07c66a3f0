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
    void *const tensors = loaded_library("libtorch_cpu.so"), *const objects = loaded_library("libtorch_python.so");
    for (int i = 0; i < 4; i++) {
        int32_t (*dtype)(void);
        if (!find(tensors, dtypes[i], &dtype)) return false;
        found->dtypes[i] = dtype();
    }
    return find(tensors, "aoti_torch_empty_strided", &found->empty) &&
           find(tensors, "aoti_torch_get_data_ptr", &found->data) &&
           find(tensors, "aoti_torch__reinterpret_tensor", &found->share) &&
           find(tensors, "aoti_torch_delete_tensor_object", &found->drop) &&
           find(tensors, "aoti_torch_grad_mode_is_enabled", &found->is_grad_enabled) &&
           find(objects, "_Z16THPVariable_WrapRKN2at10TensorBaseE", &found->object);
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

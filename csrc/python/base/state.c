/* state.c: see state.h. */
#include "state.h"

static const struct {
    const char *module, *attribute;
} object_places[KNOWN_OBJECTS] = {
    [TORCH_TENSOR] = {"torch", "Tensor"},
    [TORCH_EMPTY] = {"torch", "empty"},
    [TORCH_DTYPES + MV_F32] = {"torch", "float32"},
    [TORCH_DTYPES + MV_F16] = {"torch", "float16"},
    [TORCH_DTYPES + MV_BF16] = {"torch", "bfloat16"},
    [TORCH_DTYPES + MV_I32] = {"torch", "int32"},
    [TORCH_DTYPES + MV_I64] = {"torch", "int64"},
    [TORCH_DTYPES + MV_BOOL] = {"torch", "bool"},
    [TORCH_UINT8] = {"torch", "uint8"},
    [TORCH_DEVICE] = {"torch", "device"},
    [TORCH_SPLIT] = {"torch", "split_with_sizes"},
    [TORCH_SPLIT_FRESH] = {"torch", "unsafe_split_with_sizes"},
    [TORCH_IS_GRAD_ENABLED] = {"torch", "is_grad_enabled"},
    [TORCH_DISPATCH_MODES] = {"torch._C", "_len_torch_dispatch_stack"},
    [TORCH_IS_TRACING] = {"torch._C", "_is_tracing"},
    [TORCH_IS_FUNCTIONAL] = {"torch", "_is_functional_tensor"},
    [TORCH_FORWARD_AD] = {"torch.autograd", "forward_ad"},
    [TORCH_IS_INFERENCE_MODE] = {"torch", "is_inference_mode_enabled"},
    [TORCH_INCREMENT_VERSION] = {"torch.autograd.graph", "increment_version"},
    [TORCH_NO_FUNCTION] = {"torch._C", "_disabled_torch_function_impl"},
    [TORCH_CURRENT_STREAM] = {"torch.cuda", "current_stream"},
    [NUMPY_EMPTY] = {"numpy", "empty"},
    [NUMPY_DTYPE] = {"numpy", "dtype"},
    [NUMPY_TYPES + MV_F32] = {"numpy", "float32"},
    [NUMPY_TYPES + MV_F16] = {"numpy", "float16"},
    [NUMPY_TYPES + MV_BF16] = {"ml_dtypes", "bfloat16"},
    [NUMPY_TYPES + MV_I32] = {"numpy", "int32"},
    [NUMPY_TYPES + MV_I64] = {"numpy", "int64"},
    [NUMPY_TYPES + MV_BOOL] = {"numpy", "bool_"},
    [CUPY_EMPTY] = {"cupy", "empty"},
    [CUPY_DEVICE] = {"cupy.cuda", "Device"},
    [CUPY_CURRENT_STREAM] = {"cupy.cuda", "get_current_stream"},
    [JAX_DEVICE_PUT] = {"jax", "device_put"},
    [JAX_FROM_DLPACK] = {"jax.dlpack", "from_dlpack"},
    [DEVICE_ARRAY_EMPTY] = {"minivllm.device_array", "empty"},
};

static const char *const name_texts[KNOWN_NAMES] = {
    [NAME_ARRAY_STRUCT] = "__array_struct__",
    [NAME_CDATA] = "_cdata",
    [NAME_CUDA_ARRAY_INTERFACE] = "__cuda_array_interface__",
    [NAME_CURRENT_LEVEL] = "_current_level",
    [NAME_DATA] = "data",
    [NAME_DETACH] = "detach",
    [NAME_DEVICE] = "device",
    [NAME_DEVICE_ID] = "device_id",
    [NAME_DLPACK] = "__dlpack__",
    [NAME_DLPACK_DEVICE] = "__dlpack_device__",
    [NAME_DTYPE] = "dtype",
    [NAME_IS_NEG] = "is_neg",
    [NAME_PTR] = "ptr",
    [NAME_REQUIRES_GRAD] = "requires_grad",
    [NAME_RESHAPE] = "reshape",
    [NAME_SHAPE] = "shape",
    [NAME_STRIDES] = "strides",
    [NAME_VERSION] = "_version",
    [NAME_VIEW] = "view",
};

PyObject *keep_first(_Atomic(PyObject *) *slot, PyObject *value) {
    PyObject *stored = NULL;
    if (!value || atomic_compare_exchange_strong(slot, &stored, value)) return value;
    Py_DECREF(value);
    return stored;
}

PyObject *known(module_state *state, int object) {
    PyObject *made = atomic_load_explicit(&state->objects[object], memory_order_acquire);
    if (made) return made;
    PyObject *module = PyImport_ImportModule(object_places[object].module);
    if (!module) return NULL;
    PyObject *value = PyObject_GetAttrString(module, object_places[object].attribute);
    Py_DECREF(module);
    return keep_first(&state->objects[object], value);
}

PyObject *loaded(const char *module_name, const char *attribute) {
    PyObject *name = PyUnicode_FromString(module_name);
    PyObject *module = name ? PyImport_GetModule(name) : NULL;
    PyObject *value = module ? PyObject_GetAttrString(module, attribute) : NULL;
    Py_XDECREF(module);
    Py_XDECREF(name);
    PyErr_Clear();
    return value;
}

bool begin_state(module_state *state) {
    for (int i = 0; i < KNOWN_NAMES; i++) {
        state->names[i] = PyUnicode_InternFromString(name_texts[i]);
        if (!state->names[i]) return false;
    }
    return true;
}

int visit_state(module_state *state, visitproc visit, void *arg) {
    for (int i = 0; i < KNOWN_OBJECTS; i++) Py_VISIT(atomic_load(&state->objects[i]));
    for (int i = 0; i < MAX_TYPES; i++) Py_VISIT(atomic_load(&state->types[i].type));
    return 0;
}

static void clear_slot(_Atomic(PyObject *) *slot) {
    PyObject *value = atomic_exchange(slot, NULL);
    Py_XDECREF(value);
}

void clear_state(module_state *state) {
    for (int i = 0; i < KNOWN_OBJECTS; i++) clear_slot(&state->objects[i]);
    for (int i = 0; i < DTYPES; i++) clear_slot(&state->numpy_dtypes[i]);
    for (int i = 0; i <= DTYPES; i++)
        for (int d = 0; d <= MAX_CUDA_DEVICES; d++) clear_slot(&state->torch_options[i][d]);
    for (int i = 0; i < MAX_TYPES; i++) {
        PyTypeObject *type = atomic_exchange(&state->types[i].type, NULL);
        Py_XDECREF((PyObject *)type);
    }
    for (int i = 0; i < KNOWN_NAMES; i++) Py_CLEAR(state->names[i]);
    for (int i = 0; i < SIGNATURES; i++)
        for (int p = 0; p < MAX_PARAMETERS; p++) Py_CLEAR(state->keywords[i][p]);
}

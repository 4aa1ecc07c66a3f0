/* state.h: what the module remembers: objects and names that it looks up once, and types of tensors that it has met. */
#ifndef MV_PYTHON_STATE_H
#define MV_PYTHON_STATE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdatomic.h>
#include <stdbool.h>

#include "mv.h"

enum { DTYPES = MV_BOOL + 1 };

/* Objects of other modules, looked up at first use and kept: see the table in state.c. */
typedef enum {
    TORCH_TENSOR,
    TORCH_EMPTY,
    TORCH_DTYPES, /* in the order of mv_dtype */
    TORCH_UINT8 = TORCH_DTYPES + DTYPES,
    TORCH_DEVICE,
    TORCH_SPLIT,
    TORCH_SPLIT_FRESH,
    TORCH_IS_GRAD_ENABLED,
    TORCH_DISPATCH_MODES,
    TORCH_IS_TRACING,
    TORCH_IS_FUNCTIONAL,
    TORCH_FORWARD_AD,
    TORCH_NO_FUNCTION,
    TORCH_IS_INFERENCE_MODE,
    TORCH_INCREMENT_VERSION,
    TORCH_CURRENT_STREAM,
    NUMPY_EMPTY,
    NUMPY_DTYPE,
    NUMPY_TYPES, /* in the order of mv_dtype */
    CUPY_EMPTY = NUMPY_TYPES + DTYPES,
    CUPY_DEVICE,
    CUPY_CURRENT_STREAM,
    JAX_DEVICE_PUT,
    JAX_FROM_DLPACK,
    DEVICE_ARRAY_EMPTY,
    KNOWN_OBJECTS
} known_object;

/* Interned names: see the table in state.c. */
typedef enum {
    NAME_ARRAY_STRUCT,
    NAME_CDATA,
    NAME_CUDA_ARRAY_INTERFACE,
    NAME_CURRENT_LEVEL,
    NAME_DATA,
    NAME_DETACH,
    NAME_DEVICE,
    NAME_DEVICE_ID,
    NAME_DLPACK,
    NAME_DLPACK_DEVICE,
    NAME_DTYPE,
    NAME_IS_NEG,
    NAME_PTR,
    NAME_REQUIRES_GRAD,
    NAME_RESHAPE,
    NAME_SHAPE,
    NAME_STRIDES,
    NAME_VERSION,
    NAME_VIEW,
    KNOWN_NAMES
} known_name;

/* Whatever reads arguments by a table has one place for its interned keywords. */
#define SIGNATURE_OF(op, args) SIGNATURE_##op,
typedef enum {
    MV_OPS(SIGNATURE_OF) SIGNATURE_fused_add_rms_norm,
    SIGNATURE_LAYER_CHECK,
    SIGNATURE_LAYER_HELD,
    SIGNATURE_LAYER_CALL,
    SIGNATURE_SET_NUM_THREADS,
    SIGNATURES
} signature_index;

enum { MAX_PARAMETERS = 32 }; /* of one signature; a longer table does not compile */

/* What is known about a type of tensor. A slot is filled once, then published by storing `type`. */
typedef struct {
    const struct framework *framework; /* NULL: no tensor */
    const struct dl_exchange_api *api; /* or NULL */
    bool overrides;                    /* a torch tensor whose class changes what operations on it do */
} type_kind;

typedef struct {
    _Atomic(PyTypeObject *) type;
    type_kind kind;
} type_slot;

enum { MAX_TYPES = 64, MAX_CUDA_DEVICES = 64, STEPS = 5 };

typedef struct {
    _Atomic(PyObject *) objects[KNOWN_OBJECTS];
    PyObject *names[KNOWN_NAMES];
    PyObject *keywords[SIGNATURES][MAX_PARAMETERS]; /* interned: see arguments.h */
    /* torch.empty's keywords by dtype (the last one: uint8) and device (0: the CPU, then the GPUs) */
    _Atomic(PyObject *) torch_options[DTYPES + 1][1 + MAX_CUDA_DEVICES];
    _Atomic(PyObject *) numpy_dtypes[DTYPES];
    type_slot types[MAX_TYPES];
    atomic_int types_used;
    bool counts_steps; /* see steps.h */
    int64_t step_ns[STEPS];
} module_state;

/* The interned names; the rest begins as zeros. False with an exception set. */
bool begin_state(module_state *state);
int visit_state(module_state *state, visitproc visit, void *arg);
void clear_state(module_state *state);

PyObject *known(module_state *state, int object); /* borrowed; NULL with an error set when the import fails */
/* Stores `value` (stolen, may be NULL) unless another thread was first; gives back what is stored, borrowed. */
PyObject *keep_first(_Atomic(PyObject *) *slot, PyObject *value);

/* module.attribute, or NULL (no error set) where the module is not loaded, or only in part. A new reference. */
PyObject *loaded(const char *module_name, const char *attribute);

#endif

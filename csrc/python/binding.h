/* binding.h: what the files of the CPython binding share.
 *
 * One Python call is one `call`. It takes each tensor argument apart into an mv_view, remembers what must be given back
 * (references, DLPack exports), knows the stream to launch on, and is released at the end whatever happened:
 *
 *     begin_call, parse (arguments.c; tensors by buffers.c), outputs (results.c), mv_<op>, end_call
 *
 * How one framework's tensors are read and made is a `framework`: one file and one row in buffers.c.
 */
#ifndef MV_BINDING_H
#define MV_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdatomic.h>
#include <stdbool.h>

#include "dlpack_abi.h"
#include "mv.h"

/* Of a call: import fails where a signature could bring more tensors. Each takes a kilobyte of the stack. */
enum { MAX_DIMS = 64, MAX_TENSORS = 16 };

/* ---- the module's state ----------------------------------------------------------------------------------------- */

/* Objects of other modules, looked up at first use and kept: see the table in module.c. */
typedef enum {
    TORCH_TENSOR,
    TORCH_EMPTY,
    TORCH_DTYPES, /* three, in the order of mv_dtype */
    TORCH_UINT8 = TORCH_DTYPES + 3,
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
    NUMPY_TYPES, /* three, in the order of mv_dtype */
    CUPY_EMPTY = NUMPY_TYPES + 3,
    CUPY_DEVICE,
    CUPY_CURRENT_STREAM,
    JAX_DEVICE_PUT,
    JAX_FROM_DLPACK,
    DEVICE_ARRAY_EMPTY,
    KNOWN_OBJECTS
} known_object;

/* Interned names: see the table in module.c. */
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

typedef struct framework framework;

/* What is known about a type of tensor. A slot is filled once, then published by storing `type`. */
typedef struct {
    const framework *framework; /* NULL: no tensor */
    const dl_exchange_api *api; /* or NULL */
    bool overrides;             /* a torch tensor whose class changes what operations on it do */
} type_kind;

typedef struct {
    _Atomic(PyTypeObject *) type;
    type_kind kind;
} type_slot;

enum { MAX_TYPES = 64, MAX_CUDA_DEVICES = 64, STEPS = 5 };

typedef struct {
    _Atomic(PyObject *) objects[KNOWN_OBJECTS];
    PyObject *names[KNOWN_NAMES];
    PyObject *keywords[SIGNATURES][MAX_PARAMETERS]; /* interned: see arguments.c */
    /* torch.empty's keywords by dtype (3: uint8) and device (0: the CPU, then the GPUs) */
    _Atomic(PyObject *) torch_options[4][1 + MAX_CUDA_DEVICES];
    _Atomic(PyObject *) numpy_dtypes[3];
    type_slot types[MAX_TYPES];
    atomic_int types_used;
    bool counts_steps; /* see steps.h */
    int64_t step_ns[STEPS];
} module_state;

PyObject *known(module_state *state, int object); /* borrowed; NULL with an error set when the import fails */
/* Stores `value` (stolen, may be NULL) unless another thread was first; gives back what is stored, borrowed. */
PyObject *keep_first(_Atomic(PyObject *) *slot, PyObject *value);

/* What torch is about: does it record gradients, or is every operation watched, by a dispatch mode or a tracer? */
enum { TORCH_NO_GRADIENTS, TORCH_GRADIENTS, TORCH_WATCHED };

/* ---- one call --------------------------------------------------------------------------------------------------- */

typedef struct {
    PyObject *object; /* owned reference; NULL: none yet, but `unfinished` */
    void *unfinished; /* what a framework made, to be finished or dropped */
    const char *name; /* as the user knows it */
    int member;       /* of a tuple given under that name, or -1 */
    type_kind kind;
    mv_view *slot; /* where in the op's args its view went */
    mv_view view;  /* shape and strides point to the arrays below */
    void *managed; /* a DLPack export to give back: dl_managed_versioned when `versioned`, else dl_managed */
    bool versioned;
    PyObject *keeper;  /* keeps the data alive, where it is not the object; owned, or NULL */
    bool fresh;        /* a result that we made */
    bool has_producer; /* another framework's stream, which wrote the data and will go on with it */
    void *producer;
    int64_t shape[MAX_DIMS], strides[MAX_DIMS];
} tensor;

typedef struct {
    module_state *state;
    const char *op;
    const char *torch_function;  /* of minivllm.torch, which serves where torch itself has to take part: see torch.c */
    bool may_hand_over;          /* to that */
    bool hand_over;              /* it will; reading the arguments ends without an exception then */
    PyObject *self;              /* whose method is called; NULL: a function is */
    PyObject *const *given;      /* the arguments as they came */
    Py_ssize_t given_count;      /* of those by position */
    PyObject *given_names;       /* of the others; NULL: none */
    signed char torch_modes;     /* of this thread, asked once a call; -1: not yet */
    PyObject *result;            /* what the caller gets; NULL: an exception is set */
    const framework *streams_of; /* the framework whose current stream is `stream`; NULL: none on a GPU yet */
    void *stream;
    int32_t device;   /* of that stream; -1: not known yet */
    bool synchronize; /* before returning: a producer that says nothing about streams is involved */
    int64_t *step_ns; /* NULL: nobody counts */
    int64_t step_began;
    bool nested;   /* runs inside of another one of its thread */
    void *scratch; /* the workspace on the CPU; on a GPU it is a tensor */
    int count;
    tensor tensors[MAX_TENSORS];
} call;

void begin_call(call *c, PyObject *module, const char *op);
/* A call's frames take some 20 kB. False with RecursionError where a nested one finds little of the thread's stack. */
bool check_stack(const call *c);
void end_call(call *c); /* gives everything back, then hands over; keeps a Python error that is set */

/* ---- frameworks ------------------------------------------------------------------------------------------------- */

/* The packed projection's shape: [..., heads[0] + heads[1] + heads[2], head_dim]. */
typedef struct {
    int64_t heads[3], head_dim;
} head_counts;

struct framework {
    const char *name;
    /* Fills t->view from t->object. */
    bool (*view)(call *c, tensor *t);
    /* The stream that the framework is working on. NULL: it has none, the legacy default stream serves. */
    bool (*stream)(call *c, const tensor *t, void **stream);
    /* A new C-contiguous array on like's device, in like's dtype: made->object, or made->unfinished; and where the
     * framework knows without a view of it, made->view.data. */
    bool (*empty)(call *c, const tensor *like, int ndim, const int64_t *shape, tensor *made);
    /* `bytes` bytes of scratch on like's GPU: the same, and always made->view.data. */
    bool (*scratch)(call *c, const tensor *like, size_t bytes, tensor *made);
    /* q, k and v: a tuple of views of `out`, which is [..., heads, head_dim] when fresh, else [..., qkv]; who needs to
     * know that the op has written to a given one is told here too. */
    PyObject *(*split)(call *c, const tensor *like, const tensor *out, const head_counts *counts);
    /* From what `empty` made, which the op filled, to what the user gets. NULL: the same object. */
    PyObject *(*finish)(call *c, const tensor *like, tensor *made);
    void (*drop)(void *unfinished); /* at the end of the call; NULL: this framework leaves nothing unfinished */
    /* The op has written to t, which was given. NULL: nobody needs to know. */
    bool (*written)(call *c, const tensor *t);
};

extern const framework torch_framework, numpy_framework, cupy_framework, jax_framework, device_array_framework;
extern const framework exchange_framework, dlpack_framework, cuda_array_framework;
/* Types that are close relatives of tensors, refused by their name. */
extern const framework masked_framework, jax_tracer_framework;

/* ---- status.c: every way to refuse ------------------------------------------------------------------------------ */

/* Turns a status other than MV_OK into an exception; gives back status == MV_OK. */
bool check_status(mv_status status, const mv_error *error);
/* "<op>: <name of t> <text>" as an exception of `type`; always false. */
bool refuse(const call *c, const tensor *t, PyObject *type, const char *format, ...);
/* The same, with the exception now set as its cause, whose text it ends with. */
bool refuse_because(const call *c, const tensor *t, PyObject *type, const char *format, ...);
/* Is an exception set that must reach the caller as it is, whatever was being read? */
bool is_about_no_argument(void);
/* "<op>: <name> <text>" for what is no tensor. */
bool refuse_argument(const call *c, const char *name, PyObject *type, const char *format, ...);
bool refuse_object(const call *c, const tensor *t);                 /* it is no tensor */
bool refuse_dtype(const call *c, const tensor *t, const char *got); /* got: what it has, if it does not say so itself */

/* module.attribute, or NULL (no error set) where the module is not loaded, or only in part. A new reference. */
PyObject *loaded(const char *module_name, const char *attribute);

/* ---- helpers of more than one framework ------------------------------------------------------------------------- */

/* Does the class, a subclass of torch.Tensor, change what operations on its tensors do? -1 with an exception set. */
int torch_overrides(module_state *state, PyTypeObject *type);
/* Calls c->torch_function with the same arguments, behind c->self. */
PyObject *call_torch(const call *c);

extern const char *const dtype_names[3]; /* in the order of mv_dtype */

bool view_of_dl_tensor(call *c, tensor *t, const dl_tensor *source);
bool check_view(call *c, tensor *t); /* what every view must be: data where there are elements, aligned, few dims */
bool view_of_dlpack(call *c, tensor *t, PyObject *stream); /* by t->object.__dlpack__; stream NULL: none is passed */
void release_dlpack(tensor *t);
/* t->strides in bytes -> in elements of t->view.dtype; false with an error when they do not divide. */
bool strides_from_bytes(call *c, tensor *t);

PyObject *shape_tuple(int ndim, const int64_t *shape);
void contiguous_strides(int ndim, const int64_t *shape, int64_t *strides);
/* dict[key], a new reference: what is done with it may run code that changes the dict. NULL: where it has none, without
 * an error. */
PyObject *item_of(PyObject *dict, PyObject *key);
bool ints_of_tuple(PyObject *tuple, int64_t *values, int *count);           /* at most MAX_DIMS */
bool take_pointer(PyObject *object, const char *attribute, void **pointer); /* object.attribute; steals object */

/* By a NumPy dtype object, whose arrays CuPy's are too. False and no error set: unsupported. */
bool dtype_of_numpy(module_state *state, PyObject *dtype, mv_dtype *out);
PyObject *numpy_dtype(module_state *state, mv_dtype dtype); /* borrowed */
PyObject *numpy_new(module_state *state, mv_dtype dtype, int ndim, const int64_t *shape);

/* For objects whose makers cannot make one for us: NumPy arrays on the CPU, DeviceArray on a GPU. */
bool plain_empty(call *c, const tensor *like, int ndim, const int64_t *shape, tensor *made);
bool plain_scratch(call *c, const tensor *like, size_t bytes, tensor *made);
PyObject *split_by_slices(call *c, const tensor *like, const tensor *out, const head_counts *counts);
/* The same of `packed`, which is what `out` has become. */
PyObject *slices_of(call *c, PyObject *packed, const tensor *out, const head_counts *counts);
/* The shape of `out`, [..., qkv], with qkv split: [..., all heads, head_dim]. */
PyObject *split_shape(const tensor *out, const head_counts *counts);

#endif

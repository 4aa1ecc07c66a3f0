/* torch_c.h: torch asked, and tensors of it made, from C: in a tenth of the time that its Python functions take.
 *
 * Nothing of torch is linked or included: the functions are found at run time in the torch that is loaded. Some are
 * those that torch keeps for the code its own compiler writes. The others are C++, whose names in the library spell out
 * the types of their arguments, so that one of other types would not be found. A version that lacks any of them is
 * served through Python instead. */
#ifndef MV_PYTHON_TORCH_C_H
#define MV_PYTHON_TORCH_C_H

#include "../base/call.h"

enum { TORCH_CPU = 0, TORCH_CUDA = 1 }; /* device types */

/* torch's own: the address of an at::Tensor, which is a counted pointer to what the tensor is. */
typedef struct torch_handle torch_handle;

/* An at::Tensor by value. C++ returns an object that has a destructor through a hidden pointer, as C does a struct that
 * is too large for registers: hence its size. */
typedef struct {
    void *tensor, *unused[2];
} torch_returned;

typedef struct {
    const int64_t *data;
    size_t count;
} torch_numbers; /* c10::ArrayRef, of int64_t or of SymInt that holds one */

typedef struct {
    int64_t value;
    bool given;
} torch_optional; /* std::optional<c10::SymInt> */

typedef struct {
    void *counter; /* NULL: of an inference tensor, which has none */
} torch_version;   /* c10::VariableVersion */

typedef struct {
    /* ---- what torch is about, in this thread ---- */
    bool (*is_grad_enabled)(void);
    int64_t (*dispatch_modes)(void);
    void *const *(*tracer)(void); /* points to NULL: none */

    /* ---- tensors ---- */
    /* Each returns 0, or an error whose text it has written to stderr. */
    int32_t (*empty)(int64_t ndim, const int64_t *shape, const int64_t *strides, int32_t dtype, int32_t device_type,
                     int32_t device_index, torch_handle **made);
    int32_t (*data)(torch_handle *tensor, void **data);
    int32_t (*offset)(torch_handle *tensor, int64_t *offset); /* of its first element in its storage */
    int32_t (*drop)(torch_handle *tensor);
    /* A tensor of its own that shares the storage of `base`; strides and offset (from base's own) count elements. */
    torch_returned (*share)(const torch_handle *base, torch_numbers shape, torch_numbers strides, int64_t offset);
    /* A view of `base` that autograd knows as such; offset: in the storage. */
    torch_returned (*view)(const torch_handle *base, torch_numbers shape, torch_numbers strides,
                           const torch_optional *offset);
    /* A new torch.Tensor, which takes the tensor over and leaves the handle an empty one. */
    PyObject *(*object)(torch_handle *tensor);
    const torch_version *(*version)(const torch_handle *tensor);
    void (*set_version)(const torch_handle *tensor, const torch_version *version);
    void (*bump_version)(const torch_handle *tensor); /* not of one that has none */
    bool (*is_negated)(const torch_handle *tensor);   /* lazily: its memory holds the values with the other sign */
    int32_t dtypes[DTYPES + 1];                       /* in the order of mv_dtype, then uint8 */
} torch_c;

extern _Atomic(const torch_c *) torch_c_found; /* once it is */
const torch_c *find_torch_c(void);
/* NULL where the loaded torch lacks any of them. */
static inline const torch_c *torch_c_functions(void) {
    const torch_c *found = atomic_load_explicit(&torch_c_found, memory_order_acquire);
    return found ? found : find_torch_c();
}

/* The threads that torch's own operations run on, which spin for a while behind each; NULL where none are found. */
const mv_team *torch_team(void);

/* By its version autograd knows that a tensor it saved has changed since. Inference tensors have none. */
static inline void torch_note_write(const torch_c *torch, const torch_handle *tensor) {
    if (torch->version(tensor)->counter) torch->bump_version(tensor);
}

extern atomic_int torch_tensor_word; /* of an object, which holds this; else 0 or less */
void *ask_for_torch_tensor(module_state *state, PyObject *object);
/* What the handle of a torch.Tensor points to: `void *tensor` on the caller's stack, its address the handle, for as
 * long as the object lives. NULL with an exception set. */
static inline void *torch_tensor_of(module_state *state, PyObject *object) {
    const int word = atomic_load_explicit(&torch_tensor_word, memory_order_relaxed);
    return word > 0 ? ((void *const *)(void *)object)[word] : ask_for_torch_tensor(state, object);
}

/* How often torch has written to t, a torch.Tensor. False where torch does not count: tensors of inference mode. */
bool torch_version_of(const call *c, const tensor *t, long long *version);

#endif

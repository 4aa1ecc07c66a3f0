/* torch_c.h: tensors of torch made from C, in a tenth of the time that its Python functions take.
 *
 * These are the functions that torch keeps for the code its own compiler writes, found at run time in the torch that is
 * loaded: nothing of torch is linked or included. A version without them is served through Python instead. */
#ifndef MV_PYTHON_TORCH_C_H
#define MV_PYTHON_TORCH_C_H

#include "binding.h"

enum { TORCH_CPU = 0, TORCH_CUDA = 1 }; /* device types */

typedef struct torch_handle torch_handle; /* torch's own: a reference to a tensor, which has an owner */

typedef struct {
    /* Each returns 0, or an error whose text it has written to stderr. */
    int32_t (*empty)(int64_t ndim, const int64_t *shape, const int64_t *strides, int32_t dtype, int32_t device_type,
                     int32_t device_index, torch_handle **made);
    int32_t (*data)(torch_handle *tensor, void **data);
    /* A tensor of its own that shares the storage of `base`; strides and offset (from base's own) count elements. */
    int32_t (*share)(torch_handle *base, int64_t ndim, const int64_t *shape, const int64_t *strides, int64_t offset,
                     torch_handle **made);
    int32_t (*drop)(torch_handle *tensor);
    bool (*is_grad_enabled)(void);
    /* A new torch.Tensor that refers to the same tensor. In C++ it takes a `const at::TensorBase &`, which is the address
     * that a handle is; its name in the library spells out that type, so one of another type would not be found. */
    PyObject *(*object)(const torch_handle *tensor);
    int32_t dtypes[4]; /* in the order of mv_dtype, then uint8 */
} torch_c;

/* NULL where the loaded torch lacks any of them. */
const torch_c *torch_c_functions(void);

#endif

/* dlpack_abi.h: the memory layout of DLPack tensors and of the DLPack C exchange API, restated from the specification
 * (major version 1, and the unversioned form before it), so that building needs no header of another project. */
#ifndef MV_DLPACK_ABI_H
#define MV_DLPACK_ABI_H

#include <stdint.h>

enum { DL_CPU = 1, DL_CUDA = 2, DL_CUDA_HOST = 3, DL_CUDA_MANAGED = 13 };
enum { DL_INT = 0, DL_UINT = 1, DL_FLOAT = 2, DL_BFLOAT = 4, DL_COMPLEX = 5, DL_BOOL = 6 };
enum { DL_READ_ONLY = 1 << 0, DL_IS_COPIED = 1 << 1 };
enum { DL_MAJOR = 1, DL_MINOR = 1 }; /* what DeviceArray exports */

typedef struct {
    int32_t type;
    int32_t id;
} dl_device;

typedef struct {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
} dl_dtype;

/* A borrowed tensor. Strides count elements; NULL means C-contiguous. */
typedef struct {
    void *data;
    dl_device device;
    int32_t ndim;
    dl_dtype dtype;
    int64_t *shape;
    int64_t *strides;
    uint64_t byte_offset;
} dl_tensor;

/* An owned tensor as capsules named "dltensor" carry it. */
typedef struct dl_managed {
    dl_tensor tensor;
    void *owner;
    void (*deleter)(struct dl_managed *self);
} dl_managed;

typedef struct {
    uint32_t major;
    uint32_t minor;
} dl_version;

/* An owned tensor as capsules named "dltensor_versioned" carry it. */
typedef struct dl_managed_versioned {
    dl_version version;
    void *owner;
    void (*deleter)(struct dl_managed_versioned *self);
    uint64_t flags;
    dl_tensor tensor;
} dl_managed_versioned;

/* What a framework offers to C callers, in a capsule "dlpack_exchange_api" at type.__dlpack_c_exchange_api__. It lives
 * as long as the process. Every function wants the GIL and returns 0, or -1 with a Python error set. */
typedef struct dl_exchange_header {
    dl_version version;
    struct dl_exchange_header *previous;
} dl_exchange_header;

typedef struct dl_exchange_api {
    dl_exchange_header header;
    int (*allocate)(dl_tensor *prototype, dl_managed_versioned **out, void *context,
                    void (*set_error)(void *context, const char *kind, const char *message));
    int (*owned_from_object)(void *object, dl_managed_versioned **out);
    int (*owned_to_object)(dl_managed_versioned *tensor, void **out_object); /* steals tensor */
    int (*borrow_from_object)(void *object, dl_tensor *out);                 /* may be NULL */
    int (*current_stream)(int32_t device_type, int32_t device_id, void **out_stream);
} dl_exchange_api;

#endif

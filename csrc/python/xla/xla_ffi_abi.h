/* xla_ffi_abi.h: the memory layout of what XLA hands to a foreign function, restated from its typed FFI C interface
 * (version 0), so that building needs no header of another project. Only what we read or write; a test compares it with
 * the header of the installed jaxlib. */
#ifndef MV_XLA_FFI_ABI_H
#define MV_XLA_FFI_ABI_H

#include <stddef.h>
#include <stdint.h>

/* The version that this was restated from, and the one before which what we use was not all there. */
enum { XLA_MAJOR = 0, XLA_MINOR = 4 };

enum { XLA_METADATA = 1 };                       /* the type of extension that asks who we are */
enum { XLA_COMMAND_BUFFER_COMPATIBLE = 1 << 0 }; /* a trait: may be captured in a CUDA graph    */
enum { XLA_EXECUTE = 3 };                        /* a stage                                     */
enum { XLA_BUFFER = 1 };                         /* the type of an argument or result           */
enum { XLA_SCALAR = 3, XLA_STRING = 4 };         /* types of an attribute                       */
enum { XLA_PRED = 1, XLA_S32 = 4, XLA_S64 = 5, XLA_U8 = 6, XLA_F16 = 10, XLA_F32 = 11, XLA_F64 = 12, XLA_BF16 = 16 };
enum { XLA_INVALID_ARGUMENT = 3, XLA_RESOURCE_EXHAUSTED = 8, XLA_INTERNAL = 13 };

typedef struct xla_error xla_error;     /* theirs */
typedef struct xla_context xla_context; /* theirs */

typedef struct xla_extension {
    size_t struct_size;
    int type;
    struct xla_extension *next;
} xla_extension;

typedef struct {
    size_t struct_size;
    xla_extension *extensions;
    int major, minor;
} xla_version;

/* To be filled in for an extension of type XLA_METADATA. */
typedef struct {
    size_t struct_size;
    xla_version version;
    uint32_t traits;
} xla_metadata;

typedef struct {
    xla_extension base;
    xla_metadata *metadata;
} xla_metadata_extension;

typedef struct {
    size_t struct_size;
    xla_extension *extensions;
    int dtype;
    void *data;
    int64_t rank;
    int64_t *dims;
} xla_buffer;

typedef struct {
    const char *text; /* not terminated */
    size_t length;
} xla_span;

typedef struct {
    int dtype;
    void *value;
} xla_scalar;

typedef struct {
    size_t struct_size;
    xla_extension *extensions;
    int64_t count;
    int *types;
    void **values;
} xla_buffers;

/* Sorted by name. */
typedef struct {
    size_t struct_size;
    xla_extension *extensions;
    int64_t count;
    int *types;
    xla_span **names;
    void **values;
} xla_attributes;

/* What their functions take: what goes in, then what comes out. */
typedef struct {
    size_t struct_size;
    xla_extension *extensions;
    const char *message;
    int code;
} xla_error_create;

typedef struct {
    size_t struct_size;
    xla_extension *extensions;
    xla_context *context;
    void *stream;
} xla_stream_get;

typedef struct {
    size_t struct_size;
    xla_extension *extensions;
    xla_context *context;
    int32_t ordinal;
} xla_device_get;

typedef struct {
    size_t struct_size;
    xla_extension *extensions;
    xla_version version;
    const void *internal;
    xla_error *(*error_create)(xla_error_create *args);
    void (*unused_1[3])(void);
    xla_error *(*stream_get)(xla_stream_get *args);
    void (*unused_2[12])(void);
    xla_error *(*device_get)(xla_device_get *args);
} xla_api;

typedef struct {
    size_t struct_size;
    xla_extension *extensions;
    const xla_api *api;
    xla_context *context;
    int stage;
    xla_buffers arguments, results;
    xla_attributes attributes;
} xla_call;

typedef xla_error *xla_handler(xla_call *call);

#endif

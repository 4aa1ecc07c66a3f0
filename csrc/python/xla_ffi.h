/* xla_ffi.h: the ops as foreign functions of XLA, for minivllm/jax.py.
 *
 * When JAX traces a call, py_xla_plan() plans it for arrays of those shapes: that checks every argument, in the words
 * of the eager op, and says what to allocate and which attributes stand for the options. When XLA runs the call, a
 * handler makes the args from XLA's buffers and those attributes, plans again for the real addresses, and runs it: on
 * XLA's stream, with no memory but XLA's, without Python and without the GIL.
 *
 * Scratch is one more result. XLA assigns its address with all the others, so a captured call may be replayed; memory
 * that a handler asks XLA for while it runs is given back when it returns, and is not there at a replay. */
#ifndef MV_XLA_FFI_H
#define MV_XLA_FFI_H

#include "arguments.h"

enum { XLA_RMS_NORM, XLA_ADD_RMS_NORM, XLA_RMS_NORM_QKV, XLA_OPS };

typedef union {
    mv_rms_norm_args norm;
    mv_rms_norm_qkv_args qkv;
} op_args; /* whose members begin alike, with call, x and residual */

typedef enum { NUMBER, INTEGER, CHOICE, FLAG, TEXT } attribute_kind; /* double, int64_t, an enum, bool, const char * */

typedef struct {
    const char *name;
    attribute_kind kind;
    size_t offset; /* in the args */
} attribute;

typedef mv_status plan_function(const op_args *args, mv_plan *plan, mv_error *error);

typedef struct {
    const char *name;
    const signature *arguments; /* of the eager op */
    plan_function *plan;
    const attribute *attributes;
    const size_t *tensors; /* offsets of the views, in the order in which XLA gets the arrays */
    int attribute_count, tensor_count;
} xla_op;

extern const xla_op xla_ops[XLA_OPS]; /* xla_plan.c */

static inline mv_view *xla_view(const xla_op *op, op_args *args, int i) {
    return (mv_view *)((char *)args + op->tensors[i]);
}

/* The attribute that tells which of an op's tensors there are, as bits. */
#define XLA_GIVEN "given"

/* Bytes of the scratch result, in which a 256-byte aligned workspace has room. */
enum { XLA_ALIGNMENT = 256 };
static inline size_t xla_scratch_bytes(const mv_plan *plan) {
    return plan->workspace_bytes ? plan->workspace_bytes + XLA_ALIGNMENT : 0;
}

/* _xla_plan(op, GPU or -1 for the CPU, the op's arguments) -> (qkv, head_dim, scratch_bytes, attributes) */
PyObject *py_xla_plan(PyObject *module, PyObject *const *given, Py_ssize_t count, PyObject *names);
/* _xla_handlers() -> [(op, platform, capsule)] */
PyObject *py_xla_handlers(PyObject *module, PyObject *ignored);

#endif

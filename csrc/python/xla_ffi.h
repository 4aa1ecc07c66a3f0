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

#include "ops.h"

/* The attribute that tells which of an op's tensors there are, as bits. */
#define XLA_GIVEN "given"

/* Bytes of the scratch result, in which a 256-byte aligned workspace has room. */
enum { XLA_ALIGNMENT = 256 };
static inline size_t xla_scratch_bytes(const mv_plan *plan) {
    return plan->workspace_bytes ? plan->workspace_bytes + XLA_ALIGNMENT : 0;
}

/* How many views of p XLA may be given, and where they are: none of an output, which is its own. */
static inline int xla_views(const parameter *p, op_args *args, mv_view **views) {
    *views = (mv_view *)((char *)args + p->offset);
    return p->role != ROWS && p->role != WEIGHT ? 0 : p->kind->type == TENSORS ? 3 : 1;
}

/* _xla_plan(op, GPU or -1 for the CPU, the op's arguments) -> (qkv, head_dim, scratch_bytes, attributes) */
fast_function py_xla_plan;
/* _xla_handlers() -> [(op, platform, capsule)] */
PyObject *py_xla_handlers(PyObject *module, PyObject *ignored);

#endif

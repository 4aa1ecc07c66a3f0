/* plan.h: a call that is checked and planned, and not run: what JAX needs while it traces, and torch's checks of calls
 * that torch takes part in (minivllm/torch_checks.py). It also says how XLA gets the arguments: what plan.c makes of
 * them, handlers.c reads. */
#ifndef MV_PYTHON_PLAN_H
#define MV_PYTHON_PLAN_H

#include "../ops/ops.h"

/* The attribute that tells which of an op's tensors there are, as bits. */
#define XLA_GIVEN "given"

/* Bytes of the scratch result, in which a 256-byte aligned workspace has room. */
enum { XLA_ALIGNMENT = 256 };
static inline size_t xla_scratch_bytes(const mv_plan *plan) {
    return plan->workspace_bytes ? plan->workspace_bytes + XLA_ALIGNMENT : 0;
}

/* How many views of p XLA may be given, and where they are: none of an output, which is its own. What an op works on in
 * place is a result as well, in the same memory. */
static inline int xla_views(const parameter *p, op_args *args, mv_view **views) {
    *views = (mv_view *)((char *)args + p->offset);
    return p->role == OUTPUT || p->role == OPTION ? 0 : count_views(p->kind);
}

/* _plan(op, GPU or -1 for the CPU, the op's arguments) -> (outputs, in_out, scratch_bytes, attributes). The arguments
 * are checked in the words of the op. outputs: (shape, dtype) of each. in_out: the weights are [hidden, out]. For XLA:
 * the bytes of a result that serves as scratch, and the options. */
fast_function py_plan;

#endif

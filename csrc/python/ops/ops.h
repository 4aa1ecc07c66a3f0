/* ops.h: the ops as Python and XLA call them, all of them made from the list of mv.h. */
#ifndef MV_PYTHON_OPS_H
#define MV_PYTHON_OPS_H

#include "../convert/arguments.h"

/* What Python calls: the ops, and a second face of one of them, which works in place. */
#define FACES(FACE) MV_OPS(FACE) FACE(fused_add_rms_norm, mv_rms_norm_args)

typedef PyObject *fast_function(PyObject *module, PyObject *const *given, Py_ssize_t count, PyObject *names);

#define DECLARE_FACE(name, args)                                                                                       \
    fast_function py_##name;                                                                                           \
    extern const signature name##_signature;
FACES(DECLARE_FACE)

fast_function py_rms_norm_qkv_packed;
/* _ops() -> {op: its parameters, as described() has them} */
PyObject *py_ops(PyObject *module, PyObject *ignored);

/* The args of any op. */
#define MEMBER_OF(name, args) args name;
typedef union {
    mv_call call; /* what all of them begin with */
    MV_OPS(MEMBER_OF)
} op_args;

typedef struct {
    const char *name;
    const signature *arguments;
    mv_status (*plan)(const op_args *args, mv_plan *plan, mv_error *error);
    size_t args_size;
} op;

#define INDEX_OF(name, args) OP_##name,
enum { MV_OPS(INDEX_OF) OPS };
extern const op ops[OPS];

#endif

/* ops.h: the ops as METH_FASTCALL | METH_KEYWORDS functions. */
#ifndef MV_PYTHON_OPS_H
#define MV_PYTHON_OPS_H

#include "arguments.h"

#define LENGTH(array) ((int)(sizeof(array) / sizeof((array)[0])))
#define QKV_PARAMETER(name, convert, field)                                                                            \
    { name, convert, offsetof(mv_rms_norm_qkv_args, field) }
/* What a call and a layer both take. */
#define QKV_WEIGHT_PARAMETERS                                                                                          \
    QKV_PARAMETER("norm_weight", to_tensor, norm_weight), QKV_PARAMETER("qkv_weight", to_tensors, qkv_weight),         \
        QKV_PARAMETER("num_heads", to_integer, num_heads), QKV_PARAMETER("num_kv_heads", to_integer, num_kv_heads),    \
        QKV_PARAMETER("eps", to_number, eps), QKV_PARAMETER("bias", to_optional_tensors, bias)
#define QKV_OPTION_PARAMETERS                                                                                          \
    QKV_PARAMETER("weight_layout", to_weight_layout, weight_layout), QKV_PARAMETER("rounding", to_rounding, rounding), \
        QKV_PARAMETER("weight_offset", to_number, weight_offset),                                                      \
        QKV_PARAMETER("batch_invariant", to_flag, batch_invariant), QKV_PARAMETER("allow_tf32", to_flag, allow_tf32)

typedef PyObject *fast_function(PyObject *module, PyObject *const *given, Py_ssize_t count, PyObject *names);

fast_function py_rms_norm, py_add_rms_norm, py_fused_add_rms_norm, py_rms_norm_qkv, py_rms_norm_qkv_packed;

extern const signature rms_norm_signature, add_rms_norm_signature, rms_norm_qkv_signature;
extern const signature *const all_signatures[]; /* ends with NULL */

static inline int64_t hidden_of(const mv_view *x) { return x->ndim ? x->shape[x->ndim - 1] : 0; }
/* The call whose arguments have been read: what it returns. packed: q, k and v as one tensor. */
PyObject *run_qkv(call *c, mv_rms_norm_qkv_args *a, bool packed);

#endif

/* rms_norm_qkv.h: what a call of the op and a layer have in common. */
#ifndef MV_PYTHON_RMS_NORM_QKV_H
#define MV_PYTHON_RMS_NORM_QKV_H

#include "run.h"

#define QKV_PARAMETER(field, kind, role)                                                                               \
    { #field, &kind, role, offsetof(mv_rms_norm_qkv_args, field) }
#define QKV_WEIGHT_PARAMETERS                                                                                          \
    QKV_PARAMETER(norm_weight, tensor_value, WEIGHT), QKV_PARAMETER(qkv_weight, tensors_value, WEIGHT),                \
        QKV_PARAMETER(num_heads, integer_value, OPTION), QKV_PARAMETER(num_kv_heads, integer_value, OPTION),           \
        QKV_PARAMETER(eps, number_value, OPTION), QKV_PARAMETER(bias, optional_tensors_value, WEIGHT)
#define QKV_OPTION_PARAMETERS                                                                                          \
    QKV_PARAMETER(weight_layout, weight_layout_value, OPTION), QKV_PARAMETER(rounding, rounding_value, OPTION),        \
        QKV_PARAMETER(weight_offset, number_value, OPTION), QKV_PARAMETER(batch_invariant, flag_value, OPTION),        \
        QKV_PARAMETER(allow_tf32, flag_value, OPTION)

/* The call whose arguments have been read: what it returns. packed: q, k and v as one tensor. */
PyObject *run_qkv(call *c, mv_rms_norm_qkv_args *a, bool packed);

#endif

/* ops.h: the ops as METH_FASTCALL | METH_KEYWORDS functions. */
#ifndef MV_PYTHON_OPS_H
#define MV_PYTHON_OPS_H

#include "arguments.h"

typedef PyObject *fast_function(PyObject *module, PyObject *const *given, Py_ssize_t count, PyObject *names);

fast_function py_rms_norm, py_add_rms_norm, py_fused_add_rms_norm, py_rms_norm_qkv, py_rms_norm_qkv_packed,
    py_check_rms_norm_qkv, py_call_layer;

extern const signature rms_norm_signature, add_rms_norm_signature, rms_norm_qkv_signature;
extern const signature *const all_signatures[]; /* ends with NULL */

#endif

/* layer.h: what FusedRMSNormQKV of minivllm/layers.py is made of: the checks when it is made, and its calls. */
#ifndef MV_PYTHON_LAYER_H
#define MV_PYTHON_LAYER_H

#include "ops.h"

fast_function py_check_rms_norm_qkv, py_call_layer;
/* (class) -> a subclass of it whose calls come straight to C. */
PyObject *py_callable_layer(PyObject *module, PyObject *class);

extern const signature layer_check_signature, layer_held_signature, layer_call_signature;

#endif

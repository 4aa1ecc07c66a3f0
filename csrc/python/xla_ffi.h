/* xla_ffi.h: the ops as foreign functions of XLA, for minivllm/jax.py. */
#ifndef MV_XLA_FFI_H
#define MV_XLA_FFI_H

#include "binding.h"

/* _xla_handlers() -> [(op, platform, capsule)] */
PyObject *py_xla_handlers(PyObject *module, PyObject *ignored);
/* _xla_plan(op, GPU or -1 for the CPU, the op's arguments) -> (qkv, head_dim, scratch_bytes, attributes) */
PyObject *py_xla_plan(PyObject *module, PyObject *const *given, Py_ssize_t count, PyObject *names);

#endif

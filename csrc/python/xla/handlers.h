/* handlers.h: the ops as foreign functions of XLA, for minivllm/jax.py.
 *
 * When JAX traces a call, py_plan() plans it for arrays of those shapes: that checks every argument, in the words
 * of the eager op, and says what to allocate and which attributes stand for the options. When XLA runs the call, a
 * handler makes the args from XLA's buffers and those attributes, plans again for the real addresses, and runs it: on
 * XLA's stream, with no memory but XLA's, without Python and without the GIL.
 *
 * Scratch is one more result. XLA assigns its address with all the others, so a captured call may be replayed; memory
 * that a handler asks XLA for while it runs is given back when it returns, and is not there at a replay. */
#ifndef MV_PYTHON_HANDLERS_H
#define MV_PYTHON_HANDLERS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* _xla_handlers() -> [(op, platform, capsule)] */
PyObject *py_xla_handlers(PyObject *module, PyObject *ignored);

#endif

/* numpy.h: NumPy arrays, and dtypes of NumPy's; masked arrays are refused by that name. */
#ifndef MV_PYTHON_NUMPY_H
#define MV_PYTHON_NUMPY_H

#include "../base/call.h"

extern const framework numpy_framework, masked_framework;

/* By a NumPy dtype object, whose arrays CuPy's are too. False and no error set: unsupported. */
bool dtype_of_numpy(module_state *state, PyObject *dtype, mv_dtype *out);
PyObject *numpy_dtype(module_state *state, mv_dtype dtype); /* borrowed */
PyObject *numpy_new(module_state *state, mv_dtype dtype, int ndim, const int64_t *shape);

#endif

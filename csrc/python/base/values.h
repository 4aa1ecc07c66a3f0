/* values.h: shapes and other small values, between Python and C. */
#ifndef MV_PYTHON_VALUES_H
#define MV_PYTHON_VALUES_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stdint.h>

enum { MAX_DIMS = 64 };

PyObject *shape_tuple(int ndim, const int64_t *shape);
void contiguous_strides(int ndim, const int64_t *shape, int64_t *strides);
/* dict[key], a new reference: what is done with it may run code that changes the dict. NULL: where it has none, without
 * an error. */
PyObject *item_of(PyObject *dict, PyObject *key);
bool ints_of_tuple(PyObject *tuple, int64_t *values, int *count);           /* at most MAX_DIMS */
bool take_pointer(PyObject *object, const char *attribute, void **pointer); /* object.attribute; steals object */

#endif

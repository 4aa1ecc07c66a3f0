/* slices.h: q, k and v as slices of a packed array, for frameworks that know nothing faster: see framework.split. */
#ifndef MV_PYTHON_SLICES_H
#define MV_PYTHON_SLICES_H

#include "../base/call.h"

PyObject *split_by_slices(call *c, const tensor *like, const tensor *out, const head_counts *counts);
/* The same of `packed`, which is what `out` has become. */
PyObject *slices_of(call *c, PyObject *packed, const tensor *out, const head_counts *counts);
/* The shape of `out`, [..., qkv], with qkv split: [..., all heads, head_dim]. */
PyObject *split_shape(const tensor *out, const head_counts *counts);

#endif

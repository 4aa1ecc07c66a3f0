/* buffers.h: from any object to an mv_view. */
#ifndef MV_BUFFERS_H
#define MV_BUFFERS_H

#include "binding.h"

/* Takes `object` (borrowed) as the tensor argument `name` and writes its view to *slot. member: its place in a tuple
 * given under that name, or -1. The first tensor taken decides the stream. */
bool take_tensor(call *c, const char *name, int member, PyObject *object, mv_view *slot);
/* Adds a result, to be made by like's framework. */
tensor *add_fresh_tensor(call *c, const char *name, const tensor *like, mv_view *slot);
/* Fills its slot, once it is made: C-contiguous, in like's dtype, on its device. */
bool view_fresh_tensor(call *c, tensor *t, const tensor *like, int ndim, const int64_t *shape);
/* Has a tensor been taken for it? */
static inline bool is_given(const mv_view *slot) { return slot->shape != NULL; }
/* The tensor whose view went to `slot`; NULL when that argument is absent. */
tensor *tensor_of(call *c, const mv_view *slot);
/* After the op: makes other frameworks' streams wait for it, and the host where somebody cannot. */
bool settle(call *c);

#endif

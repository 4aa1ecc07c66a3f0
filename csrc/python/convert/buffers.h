/* buffers.h: from any object to an mv_view. */
#ifndef MV_BUFFERS_H
#define MV_BUFFERS_H

#include "../base/call.h"

/* Takes `object` (borrowed) as the tensor argument `name` and writes its view to *slot. member: its place in a tuple
 * given under that name, or -1. The first tensor taken decides the stream. */
bool take_tensor(call *c, const char *name, int member, PyObject *object, mv_view *slot);
/* The same of integers or flags. */
bool take_tensor_of(call *c, const char *name, contents holds, PyObject *object, mv_view *slot);
/* Fills the slot of a result, once it is made. */
bool view_fresh_tensor(call *c, tensor *t);
/* After the op: makes other frameworks' streams wait for it, and the host where somebody cannot. */
bool settle(call *c);

#endif

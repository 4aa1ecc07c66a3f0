/* types.h: which framework a tensor is of. */
#ifndef MV_PYTHON_TYPES_H
#define MV_PYTHON_TYPES_H

#include "../base/call.h"

/* Fills t->kind; false with an exception set, also for what is no tensor. */
bool find_framework(call *c, tensor *t);

#endif

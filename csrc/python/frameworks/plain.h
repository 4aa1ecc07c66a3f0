/* plain.h: memory for objects whose makers cannot make one for us: NumPy arrays on the CPU, DeviceArray on a GPU. */
#ifndef MV_PYTHON_PLAIN_H
#define MV_PYTHON_PLAIN_H

#include "../base/call.h"

bool plain_empty(call *c, const tensor *like, tensor *made);
bool plain_scratch(call *c, const tensor *like, size_t bytes, tensor *made);

#endif

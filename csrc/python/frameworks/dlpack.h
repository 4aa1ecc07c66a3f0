/* dlpack.h: objects with __dlpack__, types with the DLPack C exchange API, and DeviceArray. */
#ifndef MV_PYTHON_DLPACK_H
#define MV_PYTHON_DLPACK_H

#include "../base/call.h"

extern const framework dlpack_framework, exchange_framework, device_array_framework;

bool view_of_dlpack(call *c, tensor *t, PyObject *stream); /* by t->object.__dlpack__; stream NULL: none is passed */
void release_dlpack(tensor *t);                            /* gives back t->managed */

#endif

/* cupy.h: CuPy arrays. */
#ifndef MV_PYTHON_CUPY_H
#define MV_PYTHON_CUPY_H

#include "../base/call.h"

extern const framework cupy_framework;

#endif

/* cuda_array.h: objects that have only __cuda_array_interface__. */
#ifndef MV_PYTHON_CUDA_ARRAY_H
#define MV_PYTHON_CUDA_ARRAY_H

#include "../base/call.h"

extern const framework cuda_array_framework;

#endif

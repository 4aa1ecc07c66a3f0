/* torch.h: torch tensors. */
#ifndef MV_PYTHON_TORCH_H
#define MV_PYTHON_TORCH_H

#include "../base/call.h"

extern const framework torch_framework;

/* Does the class, a subclass of torch.Tensor, change what operations on its tensors do? -1 with an exception set. */
int torch_overrides(module_state *state, PyTypeObject *type);

#endif

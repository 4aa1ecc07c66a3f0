/* torch_results.h: outputs and workspace of torch, and q, k, v as views of a packed tensor: see framework. */
#ifndef MV_PYTHON_TORCH_RESULTS_H
#define MV_PYTHON_TORCH_RESULTS_H

#include "../base/call.h"

bool torch_empty(call *c, const tensor *like, tensor *made);
bool torch_scratch(call *c, const tensor *like, size_t bytes, tensor *made);
PyObject *torch_split(call *c, const tensor *like, const tensor *out, const head_counts *counts);
PyObject *torch_finish(call *c, const tensor *like, tensor *made);
void torch_drop(void *unfinished);

#endif

/* views.h: what the views of all frameworks have in common. */
#ifndef MV_PYTHON_VIEWS_H
#define MV_PYTHON_VIEWS_H

#include "../base/call.h"
#include "dlpack_abi.h"

extern const char *const dtype_names[DTYPES]; /* in the order of mv_dtype */
extern const dl_dtype dl_dtypes[DTYPES];

/* May t have it: is it what t is to hold? */
static inline bool is_wanted(const tensor *t, mv_dtype dtype) { return t->holds == contents_of(dtype); }

bool view_of_dl_tensor(call *c, tensor *t, const dl_tensor *source);
bool check_view(call *c, tensor *t); /* what every view must be: data where there are elements, aligned, few dims */
/* t->strides in bytes -> in elements of t->view.dtype; false with an error when they do not divide. */
bool strides_from_bytes(call *c, tensor *t);

#endif

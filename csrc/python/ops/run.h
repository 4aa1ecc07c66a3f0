/* run.h: what the functions of the ops have in common. */
#ifndef MV_PYTHON_RUN_H
#define MV_PYTHON_RUN_H

#include "../convert/arguments.h"

#define KERNEL_PARAMETER(args)                                                                                         \
    { "kernel", &optional_text_value, OPTION, offsetof(args, call.kernel) }

/* Makes py_<name>(), which Python calls, of <name>_signature, <name>_defaults and run_<name>(), which gives the result
 * of a call whose arguments have been read. */
#define FACE(name, args)                                                                                               \
    PyObject *py_##name(PyObject *module, PyObject *const *given, Py_ssize_t count, PyObject *names) {                 \
        args a = name##_defaults;                                                                                      \
        call c;                                                                                                        \
        begin_call(&c, module, a.call.op);                                                                             \
        if (parse(&c, &name##_signature, &a, given, count, names)) c.result = run_##name(&c, &a);                      \
        end_call(&c);                                                                                                  \
        return c.result;                                                                                               \
    }

static inline int64_t hidden_of(const mv_view *x) { return x->ndim ? x->shape[x->ndim - 1] : 0; }
/* Makes the outputs that are absent, each of the plan's in `slots`; `last`: the last dimensions of the first one, where
 * it has several in place of its columns. Then runs the plan, with the workspace that it wants. */
bool run_plan(call *c, mv_plan *plan, const mv_view *x, mv_view *const *slots, int last_count, const int64_t *last);
/* Of an op that is told where each output goes: */
#define RUN_PLAN(c, plan, x, ...) run_plan(c, plan, x, (mv_view *const[]){__VA_ARGS__}, 0, NULL)

#endif

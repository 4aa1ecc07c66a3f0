/* ops.c: see ops.h. */
#include "ops.h"

#include <string.h>

#define DEFINE_PLAN(name, args)                                                                                        \
    _Static_assert(offsetof(args, call) == 0, "the args of " #name " begin with a call");                              \
    static mv_status plan_##name(const op_args *a, mv_plan *plan, mv_error *error) {                                   \
        return mv_##name(&a->name, plan, error);                                                                       \
    }
MV_OPS(DEFINE_PLAN)

#define ROW_OF(name, args) {#name, &name##_signature, plan_##name, sizeof(args)},
const op ops[OPS] = {MV_OPS(ROW_OF)};

#define DESCRIBE(name, args)                                                                                           \
    ok = ok && (parameters = described(&name##_signature)) && PyDict_SetItemString(all, #name, parameters) == 0;       \
    Py_CLEAR(parameters);

PyObject *py_ops(PyObject *module, PyObject *ignored) {
    (void)module, (void)ignored;
    PyObject *all = PyDict_New(), *parameters = NULL;
    bool ok = all != NULL;
    FACES(DESCRIBE)
    if (!ok) Py_CLEAR(all);
    return all;
}

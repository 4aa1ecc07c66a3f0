/* arguments.h: from a METH_FASTCALL | METH_KEYWORDS call to an op's args struct, by a table.
 *
 * A row names a parameter, says how its value becomes C, and where in the args struct it goes. What the struct holds
 * before is the default. */
#ifndef MV_ARGUMENTS_H
#define MV_ARGUMENTS_H

#include "binding.h"

typedef struct parameter parameter;
struct parameter {
    const char *name;
    bool (*convert)(call *c, const parameter *p, PyObject *value, void *target);
    size_t offset; /* of the target in the args struct */
};

typedef struct {
    const char *op;
    int index;      /* of its interned keywords in the module's state */
    int required;   /* the first so many parameters have no default     */
    int positional; /* those after the first so many are keyword-only   */
    int count;
    const parameter *parameters;
} signature;

/* Fills `args`; false with an exception set, or where the call is handed over. */
bool parse(call *c, const signature *s, void *args, PyObject *const *values, Py_ssize_t count, PyObject *names);
/* The same from the attributes of an object, which must have all of them. */
bool read_attributes(call *c, const signature *s, void *args, PyObject *object);
bool intern_keywords(module_state *state, const signature *s);

/* Converters, and the C type they write. */
bool to_tensor(call *c, const parameter *p, PyObject *value, void *target);           /* mv_view             */
bool to_optional_tensor(call *c, const parameter *p, PyObject *value, void *target);  /* mv_view; None: none */
bool to_tensors(call *c, const parameter *p, PyObject *value, void *target);          /* mv_view[3]: one, or a tuple */
bool to_optional_tensors(call *c, const parameter *p, PyObject *value, void *target); /* mv_view[3]; None: none      */
bool to_number(call *c, const parameter *p, PyObject *value, void *target);           /* double              */
bool to_integer(call *c, const parameter *p, PyObject *value, void *target);          /* int64_t             */
bool to_optional_integer(call *c, const parameter *p, PyObject *value, void *target); /* int64_t; None: 0    */
bool to_flag(call *c, const parameter *p, PyObject *value, void *target);             /* bool                */
bool to_rounding(call *c, const parameter *p, PyObject *value, void *target);         /* mv_rounding         */
bool to_weight_layout(call *c, const parameter *p, PyObject *value, void *target);    /* mv_weight_layout    */
bool to_optional_text(call *c, const parameter *p, PyObject *value, void *target);    /* const char *; None: NULL */

#endif

/* refusals.h: every way to refuse. */
#ifndef MV_PYTHON_REFUSALS_H
#define MV_PYTHON_REFUSALS_H

#include "call.h"

/* A status other than MV_OK as an exception; always false. */
bool refuse_status(mv_status status, const mv_error *error);
/* The same of any status; gives back status == MV_OK. */
static inline bool check_status(mv_status status, const mv_error *error) {
    return status == MV_OK || refuse_status(status, error);
}
/* "<op>: <name of t> <text>" as an exception of `type`; always false. */
bool refuse(const call *c, const tensor *t, PyObject *type, const char *format, ...);
/* The same, with the exception now set as its cause, whose text it ends with. */
bool refuse_because(const call *c, const tensor *t, PyObject *type, const char *format, ...);
/* Is an exception set that must reach the caller as it is, whatever was being read? */
bool is_about_no_argument(void);
/* "<op>: <name> <text>" for what is no tensor. */
bool refuse_argument(const call *c, const char *name, PyObject *type, const char *format, ...);
bool refuse_object(const call *c, const tensor *t);                 /* it is no tensor */
bool refuse_dtype(const call *c, const tensor *t, const char *got); /* got: what it has, if it does not say so itself */

#endif

/* nesting.h: calls within calls. What an argument's exporter or conversion runs may call an op again, and so may what a
 * call is handed over to. */
#ifndef MV_PYTHON_NESTING_H
#define MV_PYTHON_NESTING_H

#include "call.h"

void enter_call(call *c); /* is another call of this thread under way? */
static inline void leave_call(call *c) { --*c->depth; }
bool check_rest_of_stack(const call *c);
/* A call's frames take some 25 kB. False with RecursionError where a nested one finds little of the thread's stack. */
static inline bool check_stack(const call *c) { return !c->nested || check_rest_of_stack(c); }

#endif

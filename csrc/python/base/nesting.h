/* nesting.h: calls within calls. What an argument's exporter or conversion runs may call an op again, and so may what a
 * call is handed over to. */
#ifndef MV_PYTHON_NESTING_H
#define MV_PYTHON_NESTING_H

#include "call.h"

bool enter_call(void); /* is another call of this thread under way? */
void leave_call(void);
/* A call's frames take some 25 kB. False with RecursionError where a nested one finds little of the thread's stack. */
bool check_stack(const call *c);

#endif

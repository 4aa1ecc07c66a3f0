/* steps.h: what each step of a call costs, for the benchmark of the host. Off, a step is one comparison. */
#ifndef MV_PYTHON_STEPS_H
#define MV_PYTHON_STEPS_H

#include "call.h"

enum { STEP_READ, STEP_PLAN, STEP_ALLOCATE, STEP_RUN, STEP_RETURN };

void count_step(call *c, int step);
/* Adds the time since the step before to `step`. */
static inline void end_step(call *c, int step) {
    if (c->step_ns) count_step(c, step);
}
void begin_steps(call *c);

PyObject *py_steps(PyObject *module, PyObject *on);

#endif

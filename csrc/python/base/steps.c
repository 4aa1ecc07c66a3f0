/* steps.c: see steps.h. Counts the calls of one thread at a time. */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#include "steps.h"

#include <string.h>
#include <time.h>

static int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

void begin_steps(call *c) {
    c->step_ns = c->state->counts_steps ? c->state->step_ns : NULL;
    if (c->step_ns) c->step_began = now_ns();
}

void count_step(call *c, int step) {
    const int64_t now = now_ns();
    c->step_ns[step] += now - c->step_began;
    c->step_began = now;
}

/* _steps(on) -> nanoseconds since the last time, summed over calls: (read, plan, allocate, run, return) */
PyObject *py_steps(PyObject *module, PyObject *on) {
    module_state *state = PyModule_GetState(module);
    const int counts = PyObject_IsTrue(on);
    if (counts < 0) return NULL;
    PyObject *sums = shape_tuple(STEPS, state->step_ns);
    memset(state->step_ns, 0, sizeof state->step_ns);
    state->counts_steps = counts;
    return sums;
}

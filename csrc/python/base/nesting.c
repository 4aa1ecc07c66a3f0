/* nesting.c: see nesting.h. CPython counts calls, not bytes: at its limit of a thousand our frames would have
 * overflowed the stack of most threads. */
#define _GNU_SOURCE
#include "nesting.h"

#include <pthread.h>

enum { LEAST_STACK = 64 * 1024 }; /* what a nested call, its exporters and its kernel may need */

static _Thread_local int depth;
static _Thread_local uintptr_t stack_end; /* its lowest address; 0: not asked yet */

void enter_call(call *c) {
    c->depth = &depth;
    c->nested = (*c->depth)++ > 0;
}

static uintptr_t ask_for_stack_end(void) {
    pthread_attr_t attributes;
    void *end = NULL;
    size_t size;
    if (pthread_getattr_np(pthread_self(), &attributes) != 0) return 1;
    if (pthread_attr_getstack(&attributes, &end, &size) != 0) end = NULL;
    pthread_attr_destroy(&attributes);
    return end ? (uintptr_t)end : 1;
}

/* On a stack that is not the thread's own the difference is large, and nothing is refused. */
bool check_rest_of_stack(const call *c) {
    if (!stack_end) stack_end = ask_for_stack_end();
    if ((uintptr_t)__builtin_frame_address(0) - stack_end >= LEAST_STACK) return true;
    PyErr_Format(
        PyExc_RecursionError,
        "%s: calls within calls have used up all but %d kB of this thread's stack; does what an argument runs, "
        "such as its __dlpack__, call this on the same argument?",
        c->op, LEAST_STACK / 1024);
    return false;
}

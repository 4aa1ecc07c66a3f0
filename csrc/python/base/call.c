/* call.c: see call.h. */
#include "call.h"

#include "nesting.h"
#include "steps.h"

tensor *add_fresh_tensor(call *c, const char *name, const tensor *like, mv_view *slot) {
    tensor *t = add_tensor(c, name, -1, NULL, slot);
    t->kind = like->kind;
    t->fresh = true;
    return t;
}

void plan_fresh_tensor(tensor *made, const tensor *like, mv_dtype dtype, int ndim) {
    contiguous_strides(ndim, made->shape, made->strides);
    made->view.ndim = ndim;
    made->holds = contents_of(dtype);
    made->view.dtype = dtype;
    made->view.device = like->view.device;
}

void begin_call(call *c, PyObject *module, const char *op) {
    c->state = PyModule_GetState(module);
    c->op = op;
    c->torch_function = op;
    c->may_hand_over = true;
    c->hand_over = NULL;
    c->self = NULL;
    c->torch_modes = -1;
    c->result = NULL;
    c->streams_of = NULL;
    c->stream = NULL;
    c->device = -1;
    c->synchronize = false;
    c->scratch = NULL;
    c->count = 0;
    enter_call(c);
    begin_steps(c);
}

void end_call(call *c) {
    PyObject *type, *value, *traceback;
    const bool failed = PyErr_Occurred() != NULL;
    if (failed) PyErr_Fetch(&type, &value, &traceback);
    PyMem_Free(c->scratch);
    for (int i = 0; i < c->count; i++) {
        tensor *t = &c->tensors[i];
        if (t->managed) t->release(t);
        if (t->unfinished) t->kind.framework->drop(t->unfinished);
        Py_XDECREF(t->keeper);
        Py_XDECREF(t->object);
    }
    if (failed) PyErr_Restore(type, value, traceback);
    if (c->hand_over) c->result = c->hand_over(c);
    leave_call(c);
    end_step(c, STEP_RETURN);
}

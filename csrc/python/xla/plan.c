/* plan.c: see plan.h. */
#include "plan.h"

#include <string.h>

#include "../base/refusals.h"
#include "../frameworks/views.h"

static PyObject *attribute_value(const parameter *p, const op_args *args) {
    const void *field = (const char *)args + p->offset;
    switch (p->kind->type) {
    case NUMBER: return PyFloat_FromDouble(*(const double *)field);
    case INTEGER: return PyLong_FromLongLong(*(const int64_t *)field);
    case CHOICE: return PyLong_FromLong(*(const int *)field);
    case FLAG: return PyBool_FromLong(*(const bool *)field);
    default: {
        const char *text = *(const char *const *)field;
        return PyUnicode_FromString(text ? text : "");
    }
    }
}

static bool put(PyObject *dict, const char *name, PyObject *value) {
    const bool ok = value && PyDict_SetItemString(dict, name, value) == 0;
    Py_XDECREF(value);
    return ok;
}

static PyObject *attributes_of(const op *o, op_args *args) {
    const signature *s = o->arguments;
    int64_t given = 0, bit = 1;
    PyObject *dict = PyDict_New();
    bool ok = dict != NULL;
    for (int i = 0; ok && i < s->count; i++) {
        const parameter *p = &s->parameters[i];
        mv_view *views;
        const int count = xla_views(p, args, &views);
        for (int v = 0; v < count; v++, bit *= 2)
            if (is_given(&views[v])) given |= bit;
        if (p->role == OPTION) ok = put(dict, p->name, attribute_value(p, args));
    }
    if (!ok || !put(dict, XLA_GIVEN, PyLong_FromLongLong(given))) Py_CLEAR(dict);
    return dict;
}

/* (shape, dtype) */
static PyObject *output_of(const mv_output *output) {
    const int lead = output->like->ndim - 1, dims = lead + (output->columns > 0);
    PyObject *shape = PyTuple_New(dims);
    for (int d = 0; shape && d < dims; d++) {
        PyObject *size = PyLong_FromLongLong(d < lead ? output->like->shape[d] : output->columns);
        if (!size || PyTuple_SetItem(shape, d, size) < 0) Py_CLEAR(shape);
    }
    return shape ? Py_BuildValue("(Ns)", shape, dtype_names[output->dtype]) : NULL;
}

static PyObject *outputs_of(const mv_plan *plan) {
    PyObject *outputs = PyTuple_New(plan->outputs);
    for (int i = 0; outputs && i < plan->outputs; i++) {
        PyObject *output = output_of(&plan->output[i]);
        if (!output || PyTuple_SetItem(outputs, i, output) < 0) Py_CLEAR(outputs);
    }
    return outputs;
}

static const op *op_named(PyObject *name) {
    for (int i = 0; i < OPS; i++)
        if (PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, ops[i].name) == 0) return &ops[i];
    PyErr_Format(PyExc_ValueError, "_plan: there is no op %R", name);
    return NULL;
}

/* The arrays may be stand-ins, of the right shapes and dtypes, for tensors on that device: nobody reads them. */
PyObject *py_plan(PyObject *module, PyObject *const *given, Py_ssize_t count, PyObject *names) {
    if (count < 2) return PyErr_Format(PyExc_TypeError, "_plan: takes an op, a GPU or -1, and the op's arguments");
    const op *o = op_named(given[0]);
    if (!o) return NULL;
    const long gpu = PyLong_AsLong(given[1]);
    if (gpu == -1 && PyErr_Occurred()) return NULL;
    const mv_device device = {gpu < 0 ? MV_CPU : MV_CUDA, gpu < 0 ? 0 : (int32_t)gpu};
    op_args args;
    mv_plan plan;
    mv_error error;
    PyObject *result = NULL;
    call c;
    memcpy(&args, o->arguments->defaults, o->args_size);
    begin_call(&c, module, o->name);
    c.may_hand_over = false; /* to torch, which would run the op */
    if (parse(&c, o->arguments, &args, given + 2, count - 2, names)) {
        for (int i = 0; i < c.count; i++) c.tensors[i].slot->device = device;
        if (check_status(o->plan(&args, &plan, &error), &error)) {
            PyObject *in_out = plan.weight_layout == MV_LAYOUT_IN_OUT ? Py_True : Py_False;
            result = Py_BuildValue("(NOnN)", outputs_of(&plan), in_out, (Py_ssize_t)xla_scratch_bytes(&plan),
                                   attributes_of(o, &args));
        }
    }
    end_call(&c);
    return result;
}

/* results.c: see results.h. */
#include "results.h"

#include "../base/refusals.h"
#include "../frameworks/slices.h"
#include "buffers.h"

bool provide(call *c, const mv_output *output, mv_view *slot, int last_count, const int64_t *last) {
    if (is_given(slot)) return true;
    const mv_view *x = output->like;
    const tensor *like = tensor_of(c, x);
    const int lead = x->ndim - 1;
    if (lead + last_count > MAX_DIMS)
        return refuse(c, like, PyExc_ValueError, "has %d dimensions, expected at most %d", (int)x->ndim,
                      MAX_DIMS + 1 - last_count);
    tensor *made = add_fresh_tensor(c, output->name, like, slot);
    for (int d = 0; d < lead; d++) made->shape[d] = x->shape[d];
    for (int d = 0; d < last_count; d++) made->shape[lead + d] = last[d];
    plan_fresh_tensor(made, like, output->dtype, lead + last_count);
    return like->kind.framework->empty(c, like, made) && view_fresh_tensor(c, made);
}

bool provide_workspace(call *c, const mv_view *x, size_t bytes, void **workspace) {
    enum { ALIGNMENT = 256 };
    if (bytes == 0) return true;
    void *data = NULL;
    if (x->device.kind == MV_CPU) {
        data = c->scratch = PyMem_Malloc(bytes + ALIGNMENT);
        if (!data) PyErr_NoMemory();
    } else {
        const tensor *like = tensor_of(c, x);
        tensor *made = add_fresh_tensor(c, "workspace", like, NULL);
        if (like->kind.framework->scratch(c, like, bytes + ALIGNMENT, made)) data = made->view.data;
    }
    if (!data) return false;
    *workspace = (void *)(((uintptr_t)data + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    return true;
}

static bool note_write(call *c, const tensor *result) {
    const framework *from = result->kind.framework;
    return result->fresh || !from->written || from->written(c, result);
}

static PyObject *finished(call *c, tensor *result, const tensor *like) {
    if (result->fresh && like->kind.framework->finish) return like->kind.framework->finish(c, like, result);
    if (!note_write(c, result)) return NULL;
    Py_INCREF(result->object);
    return result->object;
}

bool note_written(call *c, const mv_view *slot) { return note_write(c, tensor_of(c, slot)); }

PyObject *returned(call *c, const mv_view *slot, const mv_view *x) {
    return finished(c, tensor_of(c, slot), tensor_of(c, x));
}

PyObject *returned_pair(call *c, const mv_view *first, const mv_view *second, const mv_view *x) {
    PyObject *out = returned(c, first, x);
    PyObject *residual_out = out ? returned(c, second, x) : NULL;
    PyObject *pair = residual_out ? PyTuple_Pack(2, out, residual_out) : NULL;
    Py_XDECREF(residual_out);
    Py_XDECREF(out);
    return pair;
}

PyObject *returned_parts(call *c, const mv_view *slot, const mv_view *x, const head_counts *counts) {
    const tensor *result = tensor_of(c, slot), *like = tensor_of(c, x);
    const bool unfinished = result->fresh && like->kind.framework->finish;
    return (unfinished ? like : result)->kind.framework->split(c, like, result, counts);
}

bool check_splittable(call *c, const mv_view *slot) {
    const tensor *out = is_given(slot) ? tensor_of(c, slot) : NULL;
    if (!out || out->kind.framework->split != split_by_slices ||
        PyObject_HasAttr(out->object, c->state->names[NAME_RESHAPE]))
        return true;
    return refuse(c, out, PyExc_TypeError, "cannot be cut into q, k and v: it has no reshape; pass an array that has");
}

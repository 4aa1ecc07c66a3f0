/* buffers.c: see buffers.h. */
#include "buffers.h"

#include "../base/refusals.h"
#include "../frameworks/types.h"

/* ---- streams ---------------------------------------------------------------------------------------------------- */

/* The legacy default stream has two names. */
static void *plain_stream(void *stream) { return stream == (void *)1 ? NULL : stream; }

/* The first tensor on a GPU decides the stream; later ones that live on another stream are waited for. */
static bool join_stream(call *c, tensor *t) {
    const framework *from = t->kind.framework;
    void *stream = NULL;
    if (from == c->streams_of && !t->has_producer) return true;
    if (!t->has_producer && from->stream) {
        if (!from->stream(c, t, &stream)) return false;
        t->producer = stream;
        t->has_producer = c->streams_of != NULL;
    }
    if (!c->streams_of) {
        c->streams_of = from;
        c->stream = plain_stream(stream);
    }
    if (c->device < 0) c->device = t->view.device.index;
    t->producer = plain_stream(t->producer);
    t->has_producer = t->has_producer && t->producer != c->stream && t->view.device.index == c->device;
    mv_error error;
    return !t->has_producer || check_status(mv_cuda_stream_wait(c->device, c->stream, t->producer, &error), &error);
}

bool settle(call *c) {
    mv_error error;
    if (!c->streams_of) return true; /* nothing is on a GPU */
    for (int i = 0; i < c->count; i++) {
        const tensor *t = &c->tensors[i];
        if (t->has_producer && !check_status(mv_cuda_stream_wait(c->device, t->producer, c->stream, &error), &error))
            return false;
    }
    if (!c->synchronize) return true;
    mv_status status;
    Py_BEGIN_ALLOW_THREADS status = mv_cuda_synchronize(c->device, c->stream, &error);
    Py_END_ALLOW_THREADS return check_status(status, &error);
}

/* ---- one tensor ------------------------------------------------------------------------------------------------- */

static bool read_tensor(call *c, tensor *t) {
    if (!find_framework(c, t) || !t->kind.framework->view(c, t)) return false;
    if (t->view.device.kind == MV_CUDA && !join_stream(c, t)) return false;
    *t->slot = t->view;
    return true;
}

bool view_fresh_tensor(call *c, tensor *t) {
    if (!t->view.data) {
        c->may_hand_over = false;
        return read_tensor(c, t);
    }
    *t->slot = t->view;
    return true;
}

bool take_tensor_of(call *c, const char *name, contents holds, PyObject *object, mv_view *slot) {
    tensor *t = add_tensor(c, name, -1, object, slot);
    t->holds = holds;
    return read_tensor(c, t);
}

bool take_tensor(call *c, const char *name, int member, PyObject *object, mv_view *slot) {
    return read_tensor(c, add_tensor(c, name, member, object, slot));
}

/* jax.c: JAX arrays, given eagerly. They are immutable, so never outputs; exporting one waits until its value is there,
 * and we wait for our result before handing it over, because JAX orders its own work by no stream that we could use. */
#include "jax.h"

#include "../base/refusals.h"
#include "dlpack.h"
#include "plain.h"
#include "slices.h"

static bool jax_view(call *c, tensor *t) {
    if (!view_of_dlpack(c, t, NULL)) return false;
    t->view.read_only = true;
    c->synchronize = c->synchronize || t->view.device.kind == MV_CUDA;
    return true;
}

/* On the CPU through NumPy and device_put, since JAX reads no bfloat16 of NumPy's by DLPack; on a GPU without a
 * copy. */
static PyObject *finished(call *c, const tensor *like, PyObject *object) {
    if (like->view.device.kind == MV_CUDA) {
        PyObject *from_dlpack = known(c->state, JAX_FROM_DLPACK);
        return from_dlpack ? PyObject_CallFunctionObjArgs(from_dlpack, object, NULL) : NULL;
    }
    PyObject *put = known(c->state, JAX_DEVICE_PUT);
    PyObject *device = put ? PyObject_GetAttr(like->object, c->state->names[NAME_DEVICE]) : NULL;
    PyObject *result = device ? PyObject_CallFunctionObjArgs(put, object, device, NULL) : NULL;
    Py_XDECREF(device);
    return result;
}

static PyObject *jax_finish(call *c, const tensor *like, tensor *made) { return finished(c, like, made->object); }

static PyObject *jax_split(call *c, const tensor *like, const tensor *out, const head_counts *n) {
    PyObject *packed = finished(c, like, out->object);
    PyObject *parts = packed ? slices_of(c, packed, out, n) : NULL;
    Py_XDECREF(packed);
    return parts;
}

const framework jax_framework = {.name = "JAX",
                                 .to_float32 = ".astype('float32')",
                                 .view = jax_view,
                                 .empty = plain_empty,
                                 .scratch = plain_scratch,
                                 .split = jax_split,
                                 .finish = jax_finish};

/* What jit, vmap and grad pass instead of an array. */
static bool refuse_tracer(call *c, tensor *t) {
    return refuse(c, t, PyExc_TypeError,
                  "is a tracer, which has no values yet, expected an array; inside jit, vmap and grad use the ops of "
                  "minivllm.jax");
}

const framework jax_tracer_framework = {.name = "JAX tracer", .view = refuse_tracer};

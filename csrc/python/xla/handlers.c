/* handlers.c: what XLA calls: handlers that run a call that was planned while it was traced. See handlers.h. */
#include "handlers.h"

#include <string.h>

#include "plan.h"
#include "xla_ffi_abi.h"

/* What a handler reads out of a call, one step after the other; the first that fails leaves its sentence. */
typedef struct {
    const xla_call *frame;
    const op *op;
    mv_error error;
    int code;
} reader;

static bool fail(reader *r, int code, const char *format, ...) {
    va_list values;
    r->code = code;
    const int start = PyOS_snprintf(r->error.text, sizeof r->error.text, "%s: ", r->op->name);
    va_start(values, format);
    PyOS_vsnprintf(r->error.text + start, sizeof r->error.text - (size_t)start, format, values);
    va_end(values);
    return false;
}

static bool check(reader *r, mv_status status) {
    static const int codes[] = {[MV_BAD_TYPE] = XLA_INVALID_ARGUMENT,
                                [MV_BAD_VALUE] = XLA_INVALID_ARGUMENT,
                                [MV_DEVICE_ERROR] = XLA_INTERNAL,
                                [MV_NO_MEMORY] = XLA_RESOURCE_EXHAUSTED};
    if (status != MV_OK) r->code = codes[status];
    return status == MV_OK;
}

enum { MAX_TEXT = 128 };

/* Writes the attribute to *field, a text's terminated characters to `text`. */
static bool take_attribute(reader *r, const char *name, value_type kind, void *field, char text[MAX_TEXT]) {
    static const int dtypes[] = {[NUMBER] = XLA_F64, [INTEGER] = XLA_S64, [CHOICE] = XLA_S64, [FLAG] = XLA_PRED};
    const xla_attributes *all = &r->frame->attributes;
    int64_t i = 0;
    while (i < all->count &&
           (strlen(name) != all->names[i]->length || memcmp(name, all->names[i]->text, all->names[i]->length) != 0))
        i++;
    if (i < all->count && kind == TEXT && all->types[i] == XLA_STRING) {
        const xla_span *span = all->values[i];
        if (span->length >= MAX_TEXT) return fail(r, XLA_INVALID_ARGUMENT, "attribute %s is too long", name);
        memcpy(text, span->text, span->length);
        text[span->length] = 0;
        *(const char **)field = span->length ? text : NULL;
        return true;
    }
    const xla_scalar *scalar = i < all->count && all->types[i] == XLA_SCALAR ? all->values[i] : NULL;
    if (kind == TEXT || !scalar || scalar->dtype != dtypes[kind])
        return fail(r, XLA_INVALID_ARGUMENT, "attribute %s is missing or of another type; call minivllm.jax.%s", name,
                    r->op->name);
    switch (kind) {
    case NUMBER: *(double *)field = *(const double *)scalar->value; break;
    case INTEGER: *(int64_t *)field = *(const int64_t *)scalar->value; break;
    case CHOICE: *(int *)field = (int)*(const int64_t *)scalar->value; break;
    default: *(bool *)field = *(const bool *)scalar->value;
    }
    return true;
}

static bool take_device(reader *r, mv_device_kind kind, mv_device *device, void **stream, xla_error **theirs) {
    *device = (mv_device){kind, 0};
    if (kind == MV_CPU) return true;
    const xla_api *api = r->frame->api;
    if (api->struct_size < sizeof *api) return fail(r, XLA_INTERNAL, "this version of jaxlib is too old");
    xla_stream_get get_stream = {sizeof get_stream, NULL, r->frame->context, NULL};
    xla_device_get get_device = {offsetof(xla_device_get, ordinal) + sizeof get_device.ordinal, NULL, r->frame->context,
                                 0};
    *theirs = api->stream_get(&get_stream);
    if (!*theirs) *theirs = api->device_get(&get_device);
    device->index = get_device.ordinal;
    *stream = get_stream.stream;
    return !*theirs;
}

static bool take_view(reader *r, int64_t i, mv_device device, mv_view *view) {
    const xla_buffers *all = &r->frame->arguments;
    if (i >= all->count || all->types[i] != XLA_BUFFER)
        return fail(r, XLA_INVALID_ARGUMENT, "argument %d is missing", (int)i);
    const xla_buffer *buffer = all->values[i];
    *view = (mv_view){.data = buffer->data, .shape = buffer->dims, .ndim = (int32_t)buffer->rank, .device = device};
    switch (buffer->dtype) {
    case XLA_F32: view->dtype = MV_F32; return true;
    case XLA_F16: view->dtype = MV_F16; return true;
    case XLA_BF16: view->dtype = MV_BF16; return true;
    case XLA_S32: view->dtype = MV_I32; return true;
    case XLA_S64: view->dtype = MV_I64; return true;
    case XLA_PRED: view->dtype = MV_BOOL; return true;
    default:
        return fail(r, XLA_INVALID_ARGUMENT, "argument %d has XLA's dtype %d, which no op takes", (int)i,
                    buffer->dtype);
    }
}

static int64_t elements(int64_t rank, const int64_t *dims) {
    int64_t count = 1;
    for (int64_t d = 0; d < rank; d++) count *= dims[d];
    return count;
}

/* Result i, which must have room for so many elements of a dtype. */
static bool take_result(reader *r, int64_t i, int dtype, int64_t wanted, void **data) {
    const xla_buffers *all = &r->frame->results;
    const xla_buffer *buffer = i < all->count && all->types[i] == XLA_BUFFER ? all->values[i] : NULL;
    const int64_t got = buffer && buffer->dtype == dtype ? elements(buffer->rank, buffer->dims) : 0;
    *data = buffer ? buffer->data : NULL;
    return got >= wanted || fail(r, XLA_INVALID_ARGUMENT,
                                 "result %d has room for %lld elements, expected %lld; if the device or the number of "
                                 "threads changed since the call was traced, jax.clear_caches() has it traced again",
                                 (int)i, (long long)got, (long long)wanted);
}

/* The results in their order: the plan's outputs, what is in place, then scratch. */
static bool take_memory(reader *r, const mv_plan *plan, mv_memory *memory) {
    static const int dtypes[] = {[MV_F32] = XLA_F32, [MV_F16] = XLA_F16, [MV_BF16] = XLA_BF16,
                                 [MV_I32] = XLA_S32, [MV_I64] = XLA_S64, [MV_BOOL] = XLA_PRED};
    for (int i = 0; i < plan->outputs; i++) {
        const mv_output *output = &plan->output[i];
        const mv_view *like = output->like;
        const int64_t wanted = elements(like->ndim - 1, like->shape) * (output->columns > 0 ? output->columns : 1);
        if (!take_result(r, i, dtypes[output->dtype], wanted, &memory->output[i])) return false;
    }
    const size_t scratch = xla_scratch_bytes(plan);
    if (!take_result(r, r->frame->results.count - 1, XLA_U8, (int64_t)scratch, &memory->workspace)) return false;
    const uintptr_t start = (uintptr_t)memory->workspace + XLA_ALIGNMENT - 1;
    memory->workspace = scratch ? (void *)(start / XLA_ALIGNMENT * XLA_ALIGNMENT) : NULL;
    return true;
}

static bool run(reader *r, mv_device_kind kind, xla_error **theirs) {
    const op *o = r->op;
    op_args args = {0};
    mv_device device;
    mv_plan plan;
    mv_memory memory = {0};
    int64_t given = 0, next = 0;
    char kernel[MAX_TEXT]; /* the one text that ops have */
    args.call.op = o->name;
    if (!take_device(r, kind, &device, &args.call.stream, theirs)) return false;
    if (!take_attribute(r, XLA_GIVEN, INTEGER, &given, NULL)) return false;
    for (int i = 0; i < o->arguments->count; i++) {
        const parameter *p = &o->arguments->parameters[i];
        mv_view *views;
        const int count = xla_views(p, &args, &views);
        for (int v = 0; v < count; v++, given /= 2)
            if (given % 2 && !take_view(r, next++, device, &views[v])) return false;
        if (p->role == OPTION && !take_attribute(r, p->name, p->kind->type, (char *)&args + p->offset, kernel))
            return false;
    }
    return check(r, o->plan(&args, &plan, &r->error)) && take_memory(r, &plan, &memory) &&
           check(r, mv_run(&plan, &memory, &r->error));
}

/* XLA asks before the first call: what was this compiled for, and may it be captured? It may: what is launched depends
 * on nothing but shapes, attributes and addresses, and nothing waits or allocates. */
static bool answered_metadata(const xla_call *frame, mv_device_kind kind) {
    const xla_metadata_extension *extension = (const xla_metadata_extension *)frame->extensions;
    if (!extension || extension->base.type != XLA_METADATA) return false;
    const int theirs = frame->api->version.minor;
    extension->metadata->version.major = XLA_MAJOR;
    extension->metadata->version.minor = theirs < XLA_MINOR ? theirs : XLA_MINOR;
    extension->metadata->traits = kind == MV_CUDA ? XLA_COMMAND_BUFFER_COMPATIBLE : 0;
    return true;
}

static xla_error *handle(const xla_call *frame, const op *o, mv_device_kind kind) {
    if (answered_metadata(frame, kind)) return NULL;
    reader r = {.frame = frame, .op = o};
    xla_error *theirs = NULL;
    if (frame->stage == XLA_EXECUTE ? run(&r, kind, &theirs) : fail(&r, XLA_INTERNAL, "stage %d", frame->stage))
        return NULL;
    if (theirs) return theirs;
    xla_error_create create = {offsetof(xla_error_create, code) + sizeof create.code, NULL, r.error.text, r.code};
    return frame->api->error_create(&create);
}

/* ---- registration ----------------------------------------------------------------------------------------------- */

#define HANDLERS(name, args)                                                                                           \
    static xla_error *name##_cpu(xla_call *frame) { return handle(frame, &ops[OP_##name], MV_CPU); }                   \
    static xla_error *name##_cuda(xla_call *frame) { return handle(frame, &ops[OP_##name], MV_CUDA); }
MV_OPS(HANDLERS)

#define HANDLER_ROWS(name, args) {#name, "cpu", name##_cpu}, {#name, "CUDA", name##_cuda},
static const struct {
    const char *op, *platform;
    xla_handler *handler;
} handlers[] = {MV_OPS(HANDLER_ROWS)};

PyObject *py_xla_handlers(PyObject *module, PyObject *ignored) {
    (void)module, (void)ignored;
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < (int)(sizeof handlers / sizeof handlers[0]); i++) {
        /* A function in a capsule: as CPython and XLA want it, and ISO C does not. */
        void *address = __extension__(void *) handlers[i].handler;
        PyObject *capsule = PyCapsule_New(address, NULL, NULL);
        PyObject *row = capsule ? Py_BuildValue("(ssN)", handlers[i].op, handlers[i].platform, capsule) : NULL;
        if (!row || PyList_Append(list, row) < 0) Py_CLEAR(list);
        Py_XDECREF(row);
    }
    return list;
}

/* xla_ffi.c: the ops as foreign functions of XLA.
 *
 * When JAX traces a call, minivllm/jax.py has it planned for arrays of those shapes: that checks every argument, in the
 * words of the eager op, and says what to allocate and which attributes stand for the options. When XLA runs the call,
 * a handler makes the args from XLA's buffers and those attributes, plans again for their real addresses, and runs it:
 * on XLA's stream, with no memory but XLA's, without Python and without the GIL.
 *
 * Scratch is one more result. XLA assigns its address with all the others, so a captured call may be replayed; memory
 * that a handler asks XLA for while it runs is given back when it returns, and is not there at a replay. */
#include "xla_ffi.h"

#include <string.h>

#include "arguments.h"
#include "ops.h"
#include "xla_ffi_abi.h"

enum { SCRATCH_ALIGNMENT = 256 };

/* ---- the ops ---------------------------------------------------------------------------------------------------- */

typedef union {
    mv_rms_norm_args norm;
    mv_rms_norm_qkv_args qkv;
} op_args;

typedef enum { NUMBER, INTEGER, CHOICE, FLAG, TEXT } attribute_kind; /* double, int64_t, an enum, bool, const char * */

typedef struct {
    const char *name;
    attribute_kind kind;
    size_t offset; /* in the args */
} attribute;

typedef mv_status plan_function(const op_args *args, mv_plan *plan, mv_error *error);

typedef struct {
    const char *name;
    const signature *arguments; /* of the eager op */
    plan_function *plan;
    const attribute *attributes;
    const size_t *tensors; /* offsets of the views, in the order in which XLA gets the arrays */
    int attribute_count, tensor_count;
} xla_op;

#define LENGTH(array) ((int)(sizeof(array) / sizeof((array)[0])))
#define NORM(field) offsetof(op_args, norm.field)
#define QKV(field) offsetof(op_args, qkv.field)

static const attribute norm_attributes[] = {
    {"eps", NUMBER, NORM(eps)},
    {"weight_offset", NUMBER, NORM(weight_offset)},
    {"rounding", CHOICE, NORM(rounding)},
    {"kernel", TEXT, NORM(call.kernel)},
};
static const size_t norm_tensors[] = {NORM(x), NORM(residual), NORM(weight)};

static const attribute qkv_attributes[] = {
    {"eps", NUMBER, QKV(eps)},
    {"weight_offset", NUMBER, QKV(weight_offset)},
    {"rounding", CHOICE, QKV(rounding)},
    {"kernel", TEXT, QKV(call.kernel)},
    {"num_heads", INTEGER, QKV(num_heads)},
    {"num_kv_heads", INTEGER, QKV(num_kv_heads)},
    {"head_dim", INTEGER, QKV(head_dim)},
    {"weight_layout", CHOICE, QKV(weight_layout)},
    {"batch_invariant", FLAG, QKV(batch_invariant)},
    {"allow_tf32", FLAG, QKV(allow_tf32)},
    {"dynamic_weights", FLAG, QKV(dynamic_weights)},
};
static const size_t qkv_tensors[] = {
    QKV(x),       QKV(residual), QKV(norm_weight), QKV(qkv_weight[0]), QKV(qkv_weight[1]), QKV(qkv_weight[2]),
    QKV(bias[0]), QKV(bias[1]),  QKV(bias[2])};

static mv_status plan_rms_norm(const op_args *args, mv_plan *plan, mv_error *error) {
    return mv_rms_norm(&args->norm, plan, error);
}
static mv_status plan_add_rms_norm(const op_args *args, mv_plan *plan, mv_error *error) {
    return mv_add_rms_norm(&args->norm, plan, error);
}
static mv_status plan_rms_norm_qkv(const op_args *args, mv_plan *plan, mv_error *error) {
    return mv_rms_norm_qkv(&args->qkv, plan, error);
}

#define NORM_TABLES norm_attributes, norm_tensors, LENGTH(norm_attributes), LENGTH(norm_tensors)
#define QKV_TABLES qkv_attributes, qkv_tensors, LENGTH(qkv_attributes), LENGTH(qkv_tensors)

enum { RMS_NORM, ADD_RMS_NORM, RMS_NORM_QKV, OPS };
static const xla_op ops[OPS] = {
    [RMS_NORM] = {"rms_norm", &rms_norm_signature, plan_rms_norm, NORM_TABLES},
    [ADD_RMS_NORM] = {"add_rms_norm", &add_rms_norm_signature, plan_add_rms_norm, NORM_TABLES},
    [RMS_NORM_QKV] = {"rms_norm_qkv", &rms_norm_qkv_signature, plan_rms_norm_qkv, QKV_TABLES},
};

/* The union's members begin alike, and so do the views' places in them. */
static mv_call *call_of(op_args *args) { return &args->norm.call; }
static const mv_view *x_of(const op_args *args) { return &args->norm.x; }
static mv_view *view_at(const xla_op *o, op_args *args, int i) { return (mv_view *)((char *)args + o->tensors[i]); }

_Static_assert(NORM(call) == QKV(call) && NORM(x) == QKV(x) && NORM(residual) == QKV(residual), "a common beginning");

/* Which of the op's tensors there are, as bits: the attribute that tells a handler what its arguments mean. */
static const char given_name[] = "given";

/* ---- while JAX traces ------------------------------------------------------------------------------------------- */

static PyObject *attribute_value(const attribute *a, const op_args *args) {
    const void *field = (const char *)args + a->offset;
    switch (a->kind) {
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

static PyObject *attributes_of(const xla_op *o, op_args *args) {
    int64_t given = 0;
    for (int i = 0; i < o->tensor_count; i++)
        if (view_at(o, args, i)->shape) given |= (int64_t)1 << i;
    PyObject *dict = PyDict_New();
    bool ok = dict && put(dict, given_name, PyLong_FromLongLong(given));
    for (int i = 0; ok && i < o->attribute_count; i++)
        ok = put(dict, o->attributes[i].name, attribute_value(&o->attributes[i], args));
    if (!ok) Py_CLEAR(dict);
    return dict;
}

static const xla_op *op_named(PyObject *name) {
    for (int i = 0; i < OPS; i++)
        if (PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, ops[i].name) == 0) return &ops[i];
    PyErr_Format(PyExc_ValueError, "_xla_plan: there is no op %R", name);
    return NULL;
}

/* The arrays are NumPy's, of the right shapes and dtypes, and stand for JAX's on that device. */
PyObject *py_xla_plan(PyObject *module, PyObject *const *given, Py_ssize_t count, PyObject *names) {
    if (count < 2) return PyErr_Format(PyExc_TypeError, "_xla_plan: takes an op, a GPU or -1, and the op's arguments");
    const xla_op *o = op_named(given[0]);
    if (!o) return NULL;
    const long gpu = PyLong_AsLong(given[1]);
    if (gpu == -1 && PyErr_Occurred()) return NULL;
    const mv_device device = {gpu < 0 ? MV_CPU : MV_CUDA, gpu < 0 ? 0 : (int32_t)gpu};
    op_args args = {0};
    mv_plan plan;
    mv_error error;
    PyObject *result = NULL;
    call c;
    call_of(&args)->op = o->name;
    begin_call(&c, module, o->name);
    if (parse(&c, o->arguments, &args, given + 2, count - 2, names)) {
        for (int i = 0; i < o->tensor_count; i++) view_at(o, &args, i)->device = device;
        if (check_status(o->plan(&args, &plan, &error), &error)) {
            const size_t bytes = plan.workspace_bytes;
            result = Py_BuildValue("(LLnN)", (long long)plan.qkv, (long long)plan.head_dim,
                                   (Py_ssize_t)(bytes ? bytes + SCRATCH_ALIGNMENT : 0), attributes_of(o, &args));
        }
    }
    end_call(&c);
    return result;
}

/* ---- while XLA runs --------------------------------------------------------------------------------------------- */

/* What a handler reads out of a call, one step after the other; the first that fails leaves its sentence. */
typedef struct {
    const xla_call *frame;
    const xla_op *op;
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
static bool take_attribute(reader *r, const char *name, attribute_kind kind, void *field, char text[MAX_TEXT]) {
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
    default:
        return fail(r, XLA_INVALID_ARGUMENT, "argument %d has XLA's dtype %d, expected float32, float16 or bfloat16",
                    (int)i, buffer->dtype);
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

/* The results in their order: out, residual_out where there is a residual, scratch. */
static bool take_memory(reader *r, const op_args *args, const mv_plan *plan, mv_memory *memory) {
    static const int dtypes[] = {[MV_F32] = XLA_F32, [MV_F16] = XLA_F16, [MV_BF16] = XLA_BF16};
    const mv_view *x = x_of(args);
    const int64_t size = elements(x->ndim, x->shape), hidden = x->shape[x->ndim - 1];
    const int64_t columns = plan->qkv ? plan->qkv : hidden;
    const size_t bytes = plan->workspace_bytes;
    int64_t next = 0;
    if (!take_result(r, next++, dtypes[x->dtype], size / hidden * columns, &memory->out)) return false;
    if (args->norm.residual.shape && !take_result(r, next++, dtypes[x->dtype], size, &memory->residual_out))
        return false;
    if (!take_result(r, next, XLA_U8, (int64_t)(bytes ? bytes + SCRATCH_ALIGNMENT : 0), &memory->workspace))
        return false;
    const uintptr_t start = (uintptr_t)memory->workspace + SCRATCH_ALIGNMENT - 1;
    memory->workspace = bytes ? (void *)(start / SCRATCH_ALIGNMENT * SCRATCH_ALIGNMENT) : NULL;
    return true;
}

static bool run(reader *r, mv_device_kind kind, xla_error **theirs) {
    const xla_op *o = r->op;
    op_args args = {0};
    mv_device device;
    mv_plan plan;
    mv_memory memory = {0};
    int64_t given = 0, next = 0;
    char kernel[MAX_TEXT];
    call_of(&args)->op = o->name;
    if (!take_device(r, kind, &device, &call_of(&args)->stream, theirs)) return false;
    if (!take_attribute(r, given_name, INTEGER, &given, NULL)) return false;
    for (int i = 0; i < o->attribute_count; i++) {
        const attribute *a = &o->attributes[i];
        if (!take_attribute(r, a->name, a->kind, (char *)&args + a->offset, kernel)) return false;
    }
    for (int i = 0; i < o->tensor_count; i++)
        if (given >> i & 1 && !take_view(r, next++, device, view_at(o, &args, i))) return false;
    return check(r, o->plan(&args, &plan, &r->error)) && take_memory(r, &args, &plan, &memory) &&
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

static xla_error *handle(const xla_call *frame, const xla_op *o, mv_device_kind kind) {
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

#define HANDLERS(name, index)                                                                                          \
    static xla_error *name##_cpu(xla_call *frame) { return handle(frame, &ops[index], MV_CPU); }                       \
    static xla_error *name##_cuda(xla_call *frame) { return handle(frame, &ops[index], MV_CUDA); }

HANDLERS(rms_norm, RMS_NORM)
HANDLERS(add_rms_norm, ADD_RMS_NORM)
HANDLERS(rms_norm_qkv, RMS_NORM_QKV)

static const struct {
    const char *op, *platform;
    xla_handler *handler;
} handlers[] = {
    {"rms_norm", "cpu", rms_norm_cpu},         {"rms_norm", "CUDA", rms_norm_cuda},
    {"add_rms_norm", "cpu", add_rms_norm_cpu}, {"add_rms_norm", "CUDA", add_rms_norm_cuda},
    {"rms_norm_qkv", "cpu", rms_norm_qkv_cpu}, {"rms_norm_qkv", "CUDA", rms_norm_qkv_cuda},
};

PyObject *py_xla_handlers(PyObject *module, PyObject *ignored) {
    (void)module, (void)ignored;
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < LENGTH(handlers); i++) {
        /* A function in a capsule: as CPython and XLA want it, and ISO C does not. */
        void *address = __extension__(void *) handlers[i].handler;
        PyObject *capsule = PyCapsule_New(address, NULL, NULL);
        PyObject *row = capsule ? Py_BuildValue("(ssN)", handlers[i].op, handlers[i].platform, capsule) : NULL;
        if (!row || PyList_Append(list, row) < 0) Py_CLEAR(list);
        Py_XDECREF(row);
    }
    return list;
}

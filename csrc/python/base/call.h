/* call.h: one call from Python, and what it asks of a framework.
 *
 * A call takes each tensor argument apart into an mv_view, remembers what must be given back (references, DLPack
 * exports), knows the stream to launch on, and is released at the end whatever happened:
 *
 *     begin_call, parse (tensors one by one), outputs and workspace, mv_<op>, end_call
 *
 * How one framework's tensors are read and made is a `framework`: one file in frameworks/ and one row in types.c. */
#ifndef MV_PYTHON_CALL_H
#define MV_PYTHON_CALL_H

#include "state.h"
#include "values.h"

/* Of a call: import fails where a signature could bring more. Each takes a kilobyte of the stack. */
enum { MAX_TENSORS = 16 };

typedef struct framework framework;

typedef enum { HOLDS_FLOATS, HOLDS_INTEGERS, HOLDS_FLAGS } contents; /* of a tensor: flags are bool */
static inline contents contents_of(mv_dtype dtype) {
    return dtype == MV_BOOL ? HOLDS_FLAGS : dtype >= MV_I32 ? HOLDS_INTEGERS : HOLDS_FLOATS;
}

/* What torch is about: does it record gradients, or is every operation watched, by a dispatch mode or a tracer? */
enum { TORCH_NO_GRADIENTS, TORCH_GRADIENTS, TORCH_WATCHED };

/* ---- one call --------------------------------------------------------------------------------------------------- */

typedef struct tensor {
    PyObject *object; /* owned reference; NULL: none yet, but `unfinished` */
    void *unfinished; /* what a framework made, to be finished or dropped */
    const char *name; /* as the user knows it */
    int member;       /* of a tuple given under that name, or -1 */
    contents holds;   /* what it is to hold */
    type_kind kind;
    mv_view *slot; /* where in the op's args its view went */
    mv_view view;  /* shape and strides point to the arrays below */
    void *managed; /* a DLPack export to give back: dl_managed_versioned when `versioned`, else dl_managed */
    bool versioned;
    void (*release)(struct tensor *t); /* gives it back */
    PyObject *keeper;                  /* keeps the data alive, where it is not the object; owned, or NULL */
    bool fresh;                        /* a result that we made */
    bool has_producer;                 /* another framework's stream, which wrote the data and will go on with it */
    void *producer;
    int64_t shape[MAX_DIMS], strides[MAX_DIMS];
} tensor;

typedef struct call call;
struct call {
    module_state *state;
    const char *op;
    const char *torch_function; /* of minivllm.torch, which serves where torch itself has to take part: see torch.c */
    bool may_hand_over;         /* to that */
    PyObject *(*hand_over)(const call *c); /* what does it; NULL: nobody. Reading ends without an exception then */
    PyObject *self;                        /* whose method is called; NULL: a function is */
    PyObject *const *given;                /* the arguments as they came */
    Py_ssize_t given_count;                /* of those by position */
    PyObject *given_names;                 /* of the others; NULL: none */
    signed char torch_modes;               /* of this thread, asked once a call; -1: not yet */
    PyObject *result;                      /* what the caller gets; NULL: an exception is set */
    const framework *streams_of;           /* the framework whose current stream is `stream`; NULL: none on a GPU yet */
    void *stream;
    int32_t device;   /* of that stream; -1: not known yet */
    bool synchronize; /* before returning: a producer that says nothing about streams is involved */
    int64_t *step_ns; /* NULL: nobody counts */
    int64_t step_began;
    int *depth;    /* how many calls of its thread are under way */
    bool nested;   /* others are */
    void *scratch; /* the workspace on the CPU; on a GPU it is a tensor */
    int count;
    tensor tensors[MAX_TENSORS];
};

void begin_call(call *c, PyObject *module, const char *op);
void end_call(call *c); /* gives everything back, then hands over; keeps a Python error that is set */

/* Adds `object` (borrowed; NULL: none yet) as the tensor argument `name`, whose view will go to *slot. member: its
 * place in a tuple given under that name, or -1. */
static inline tensor *add_tensor(call *c, const char *name, int member, PyObject *object, mv_view *slot) {
    tensor *t = &c->tensors[c->count++];
    Py_XINCREF(object);
    t->object = object;
    t->unfinished = NULL;
    t->name = name;
    t->member = member;
    t->holds = HOLDS_FLOATS;
    t->slot = slot;
    t->managed = NULL;
    t->keeper = NULL;
    t->fresh = false;
    t->has_producer = false;
    t->producer = NULL;
    t->view = (mv_view){.shape = t->shape, .strides = t->strides};
    return t;
}

/* Adds a result, to be made by like's framework. */
tensor *add_fresh_tensor(call *c, const char *name, const tensor *like, mv_view *slot);
/* Its view, but for the data: C-contiguous of the `ndim` sizes in its shape, in this dtype, on like's device. */
void plan_fresh_tensor(tensor *made, const tensor *like, mv_dtype dtype, int ndim);
/* Has a tensor been taken for it? */
static inline bool is_given(const mv_view *slot) { return slot->shape != NULL; }
/* The tensor whose view went to `slot`; NULL when that argument is absent. */
static inline tensor *tensor_of(call *c, const mv_view *slot) {
    for (tensor *t = c->tensors, *end = t + c->count; t < end; t++)
        if (t->slot == slot) return t;
    return NULL;
}

/* ---- frameworks ------------------------------------------------------------------------------------------------- */

/* The packed projection's shape: [..., heads[0] + heads[1] + heads[2], head_dim]. */
typedef struct {
    int64_t heads[3], head_dim;
} head_counts;

struct framework {
    const char *name;
    const char *to_float32; /* how its tensors are converted, for a refusal; NULL: we do not know */
    /* Fills t->view from t->object. */
    bool (*view)(call *c, tensor *t);
    /* The stream that the framework is working on. NULL: it has none, the legacy default stream serves. */
    bool (*stream)(call *c, const tensor *t, void **stream);
    /* A new array, which made->view describes: made->object, or made->unfinished; and where the framework knows without
     * a view of it, made->view.data. */
    bool (*empty)(call *c, const tensor *like, tensor *made);
    /* `bytes` bytes of scratch on like's GPU: the same, and always made->view.data. */
    bool (*scratch)(call *c, const tensor *like, size_t bytes, tensor *made);
    /* q, k and v: a tuple of views of `out`, which is [..., heads, head_dim] when fresh, else [..., qkv]; who needs to
     * know that the op has written to a given one is told here too. */
    PyObject *(*split)(call *c, const tensor *like, const tensor *out, const head_counts *counts);
    /* From what `empty` made, which the op filled, to what the user gets. NULL: the same object. */
    PyObject *(*finish)(call *c, const tensor *like, tensor *made);
    void (*drop)(void *unfinished); /* at the end of the call; NULL: this framework leaves nothing unfinished */
    /* The threads of its own operations on the CPU, or NULL; NULL: it has none. */
    const mv_team *(*team)(void);
    /* The op has written to t, which was given. NULL: nobody needs to know. */
    bool (*written)(call *c, const tensor *t);
};

#endif

/* torch.c: torch tensors, through the C exchange API (torch 2.10 and later) or __dlpack__.
 *
 * The exchange API checks neither requires_grad nor the negative bit, and knows no subclass that holds no memory of its
 * own: those checks are here.
 *
 * Where torch itself has to take part in a call, the whole call goes to minivllm/torch.py: when a gradient is asked
 * for; when every operation is watched, by a dispatch mode or a tracer; when a tensor's class overrides operations; and
 * when a tensor has no memory (that of a vmap, meta tensors). */
#include "torch.h"

#include "../base/refusals.h"
#include "dlpack.h"
#include "torch_c.h"
#include "torch_results.h"
#include "views.h"

/* ---- when torch has to take part -------------------------------------------------------------------------------- */

/* Calls c->torch_function with the same arguments, behind c->self. */
static PyObject *call_torch(const call *c) {
    PyObject *module = PyImport_ImportModule("minivllm.torch");
    PyObject *function = module ? PyObject_GetAttrString(module, c->torch_function) : NULL;
    const Py_ssize_t self = c->self != NULL, named = c->given_names ? PyTuple_Size(c->given_names) : 0;
    PyObject *positional = function ? PyTuple_New(self + c->given_count) : NULL;
    PyObject *keywords = positional ? PyDict_New() : NULL;
    bool ok = keywords != NULL;
    for (Py_ssize_t i = 0; ok && i < self + c->given_count; i++) {
        PyObject *argument = i < self ? c->self : c->given[i - self];
        Py_INCREF(argument);
        ok = PyTuple_SetItem(positional, i, argument) == 0;
    }
    for (Py_ssize_t i = 0; ok && i < named; i++)
        ok = PyDict_SetItem(keywords, PyTuple_GetItem(c->given_names, i), c->given[c->given_count + i]) == 0;
    PyObject *result = ok ? PyObject_Call(function, positional, keywords) : NULL;
    Py_XDECREF(keywords);
    Py_XDECREF(positional);
    Py_XDECREF(function);
    Py_XDECREF(module);
    return result;
}

static bool hand_over(call *c) {
    c->hand_over = call_torch;
    return false;
}

static bool same_attribute(PyTypeObject *type, const char *name, PyObject *usual) {
    PyObject *own = PyObject_GetAttrString((PyObject *)type, name);
    const bool same = own && own == usual;
    if (!own) PyErr_Clear();
    Py_XDECREF(own);
    return same;
}

/* FakeTensor, DTensor. */
static bool overrides_dispatch(PyTypeObject *type, PyObject *tensor_type) {
    PyObject *usual = PyObject_GetAttrString(tensor_type, "__torch_dispatch__");
    const bool overrides = !usual || !same_attribute(type, "__torch_dispatch__", usual);
    Py_XDECREF(usual);
    return overrides;
}

/* Subclasses inherit Tensor's __torch_function__, which makes results of their class; that of Parameter is disabled. */
int torch_overrides(module_state *state, PyTypeObject *type) {
    PyObject *tensor_type = known(state, TORCH_TENSOR);
    PyObject *disabled = known(state, TORCH_NO_FUNCTION);
    if (!tensor_type || !disabled) return -1;
    if ((PyObject *)type == tensor_type) return 0;
    return overrides_dispatch(type, tensor_type) || !same_attribute(type, "__torch_function__", disabled);
}

/* function() as a number; -1 with an exception set. */
static long ask(call *c, int function) {
    PyObject *callable = known(c->state, function);
    PyObject *answer = callable ? PyObject_CallNoArgs(callable) : NULL;
    const long number = answer ? PyLong_AsLong(answer) : -1;
    Py_XDECREF(answer);
    return number;
}

static bool outside_of_forward_mode(call *c) {
    PyObject *forward_ad = known(c->state, TORCH_FORWARD_AD);
    PyObject *level = forward_ad ? PyObject_GetAttr(forward_ad, c->state->names[NAME_CURRENT_LEVEL]) : NULL;
    const bool outside = level && PyLong_AsLong(level) < 0; /* -1 */
    Py_XDECREF(level);
    if (!outside && !PyErr_Occurred())
        PyErr_Format(PyExc_RuntimeError,
                     "%s: has no derivatives in forward mode; call it outside of torch.func.jvp, jacfwd, hessian and "
                     "torch.autograd.forward_ad.dual_level",
                     c->op);
    return outside;
}

/* What torch is about in this thread: c->torch_modes. */
static bool ask_modes(call *c) {
    const torch_c *torch = torch_c_functions();
    const bool grad = torch ? torch->is_grad_enabled() : ask(c, TORCH_IS_GRAD_ENABLED) != 0;
    const bool watched = torch ? torch->dispatch_modes() != 0 || *torch->tracer()
                               : ask(c, TORCH_DISPATCH_MODES) != 0 || ask(c, TORCH_IS_TRACING) != 0;
    c->torch_modes = watched ? TORCH_WATCHED : grad ? TORCH_GRADIENTS : TORCH_NO_GRADIENTS;
    return !PyErr_Occurred() && outside_of_forward_mode(c);
}

/* False also when the call is handed over. */
static bool check_modes(call *c, tensor *t) {
    if (c->torch_modes < 0 && !ask_modes(c)) return false;
    if (c->torch_modes != TORCH_GRADIENTS) return c->torch_modes == TORCH_NO_GRADIENTS || hand_over(c);
    PyObject *requires_grad = PyObject_GetAttr(t->object, c->state->names[NAME_REQUIRES_GRAD]);
    if (!requires_grad) return false;
    Py_DECREF(requires_grad);
    return requires_grad != Py_True || hand_over(c);
}

/* ---- views ------------------------------------------------------------------------------------------------------ */

/* Where a call is not handed over: a subclass that overrides __torch_dispatch__ need not have memory behind it. */
static bool check_memory(call *c, tensor *t) {
    PyTypeObject *type = Py_TYPE(t->object);
    PyObject *tensor_type = known(c->state, TORCH_TENSOR);
    if (!tensor_type) return false;
    if (!overrides_dispatch(type, tensor_type)) return true;
    PyObject *name = PyType_GetQualName(type);
    if (name)
        refuse(c, t, PyExc_TypeError,
               "is a %U, which is no plain memory (it overrides __torch_dispatch__), expected a "
               "torch.Tensor; pass the local tensor behind it",
               name);
    Py_XDECREF(name);
    return false;
}

static int is_negated(call *c, tensor *t) { /* -1 with an exception set */
    const torch_c *torch = torch_c_functions();
    if (torch) {
        void *const tensor = torch_tensor_of(c->state, t->object);
        return tensor ? torch->is_negated((const torch_handle *)&tensor) : -1;
    }
    PyObject *negated = PyObject_CallMethodObjArgs(t->object, c->state->names[NAME_IS_NEG], NULL);
    Py_XDECREF(negated);
    return negated ? negated == Py_True : -1;
}

/* As the imaginary part of a conjugated tensor is: torch has only marked it, and its memory holds the other sign. */
static bool check_not_negated(call *c, tensor *t) {
    const int negated = is_negated(c, t);
    return negated == 0 || (negated > 0 && refuse(c, t, PyExc_ValueError,
                                                  "is lazily negated (is_neg()): its memory holds the values with the "
                                                  "other sign; pass its resolve_neg()"));
}

/* torch before 2.10. __dlpack__ refuses whatever requires grad, also in no_grad mode. */
static bool view_by_protocol(call *c, tensor *t) {
    PyObject *detached = PyObject_CallMethodObjArgs(t->object, c->state->names[NAME_DETACH], NULL);
    if (!detached) return refuse_because(c, t, PyExc_BufferError, "cannot be read");
    PyObject *const given = t->object;
    PyObject *no_wait = PyLong_FromLong(-1);
    t->object = detached;
    const bool ok = no_wait && view_of_dlpack(c, t, no_wait);
    t->object = given;
    Py_XDECREF(no_wait);
    Py_DECREF(detached);
    return ok;
}

/* Inside torch.func.functionalize, where the exchange API gives a null pointer. Storage that was freed has one, too,
 * and would come back here for ever. */
static bool is_functional(call *c, tensor *t) {
    PyObject *function = known(c->state, TORCH_IS_FUNCTIONAL);
    PyObject *answer = function ? PyObject_CallFunctionObjArgs(function, t->object, NULL) : NULL;
    Py_XDECREF(answer);
    return answer == Py_True;
}

static bool view_by_exchange(call *c, tensor *t) {
    dl_tensor borrowed;
    if (t->kind.api->borrow_from_object(t->object, &borrowed) != 0) {
        if (c->may_hand_over && PyErr_ExceptionMatches(PyExc_RuntimeError)) {
            PyErr_Clear();
            return hand_over(c);
        }
        return refuse_because(c, t, PyExc_BufferError, "is no tensor in plain memory");
    }
    if (!borrowed.data && c->may_hand_over) {
        if (is_functional(c, t)) return hand_over(c);
        if (PyErr_Occurred()) return false;
    }
    return view_of_dl_tensor(c, t, &borrowed);
}

static bool torch_view(call *c, tensor *t) {
    if (t->kind.overrides) {
        if (c->may_hand_over) return hand_over(c);
        if (!check_memory(c, t)) return false;
    }
    if (c->may_hand_over && !check_modes(c, t)) return false;
    return (t->kind.api ? view_by_exchange(c, t) : view_by_protocol(c, t)) && check_not_negated(c, t);
}

static bool torch_stream(call *c, const tensor *t, void **stream) {
    if (t->kind.api) return t->kind.api->current_stream(DL_CUDA, t->view.device.index, stream) == 0;
    PyObject *function = known(c->state, TORCH_CURRENT_STREAM);
    PyObject *object = function ? PyObject_CallFunction(function, "i", (int)t->view.device.index) : NULL;
    return object && take_pointer(object, "cuda_stream", stream);
}

static bool torch_written(call *c, const tensor *t) {
    const torch_c *torch = torch_c_functions();
    if (torch) {
        void *const tensor = torch_tensor_of(c->state, t->object);
        if (!tensor) return false;
        torch_note_write(torch, (const torch_handle *)&tensor);
        return true;
    }
    const long inference = ask(c, TORCH_IS_INFERENCE_MODE);
    if (inference != 0) return inference > 0;
    PyObject *function = known(c->state, TORCH_INCREMENT_VERSION);
    PyObject *none = function ? PyObject_CallFunctionObjArgs(function, t->object, NULL) : NULL;
    Py_XDECREF(none);
    return none != NULL;
}

const framework torch_framework = {.name = "torch",
                                   .to_float32 = ".to(torch.float32)",
                                   .view = torch_view,
                                   .stream = torch_stream,
                                   .empty = torch_empty,
                                   .scratch = torch_scratch,
                                   .split = torch_split,
                                   .finish = torch_finish,
                                   .drop = torch_drop,
                                   .team = torch_team,
                                   .written = torch_written};

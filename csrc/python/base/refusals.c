/* refusals.c: every way in which the binding refuses. One function turns a status into an exception; the others make
 * the sentences about Python objects, which the ops below never see. */
#include "refusals.h"

#include <stdarg.h>
#include <string.h>

bool refuse_status(mv_status status, const mv_error *error) {
    PyObject *const types[] = {[MV_BAD_TYPE] = PyExc_TypeError,
                               [MV_BAD_VALUE] = PyExc_ValueError,
                               [MV_DEVICE_ERROR] = PyExc_RuntimeError,
                               [MV_NO_MEMORY] = PyExc_MemoryError};
    /* The text may quote the caller and be cut in the middle of a character. */
    PyObject *text = PyUnicode_DecodeUTF8(error->text, (Py_ssize_t)strlen(error->text), "replace");
    if (text) PyErr_SetObject(types[status], text);
    Py_XDECREF(text);
    return false;
}

static PyObject *sentence(const call *c, const char *name, int member, const char *format, va_list values) {
    PyObject *text = PyUnicode_FromFormatV(format, values);
    if (!text) return NULL;
    PyObject *whole = member < 0 ? PyUnicode_FromFormat("%s: %s %U", c->op, name, text)
                                 : PyUnicode_FromFormat("%s: %s[%d] %U", c->op, name, member, text);
    Py_DECREF(text);
    return whole;
}

bool refuse_argument(const call *c, const char *name, PyObject *type, const char *format, ...) {
    va_list values;
    va_start(values, format);
    PyObject *text = sentence(c, name, -1, format, values);
    va_end(values);
    if (text) PyErr_SetObject(type, text);
    Py_XDECREF(text);
    return false;
}

bool refuse(const call *c, const tensor *t, PyObject *type, const char *format, ...) {
    va_list values;
    va_start(values, format);
    PyObject *text = sentence(c, t->name, t->member, format, values);
    va_end(values);
    if (text) PyErr_SetObject(type, text);
    Py_XDECREF(text);
    return false;
}

/* torch's errors go on with a C++ stack. */
static PyObject *first_line(PyObject *exception) {
    PyObject *text = PyObject_Str(exception);
    const Py_ssize_t length = text ? PyUnicode_GetLength(text) : 0;
    const Py_ssize_t end = text ? PyUnicode_FindChar(text, '\n', 0, length, 1) : -1;
    PyObject *line = text ? PyUnicode_Substring(text, 0, end < 0 ? length : end) : NULL;
    Py_XDECREF(text);
    if (!line) PyErr_Clear(); /* an exception that cannot be shown is still the cause */
    return line;
}

/* KeyboardInterrupt, SystemExit, MemoryError and RecursionError. */
bool is_about_no_argument(void) {
    return PyErr_Occurred() && (!PyErr_ExceptionMatches(PyExc_Exception) || PyErr_ExceptionMatches(PyExc_MemoryError) ||
                                PyErr_ExceptionMatches(PyExc_RecursionError));
}

bool refuse_because(const call *c, const tensor *t, PyObject *type, const char *format, ...) {
    if (is_about_no_argument()) return false;
    PyObject *cause_type, *cause, *traceback;
    PyErr_Fetch(&cause_type, &cause, &traceback);
    PyErr_NormalizeException(&cause_type, &cause, &traceback);
    if (traceback) PyException_SetTraceback(cause, traceback);
    Py_XDECREF(traceback);
    va_list values;
    va_start(values, format);
    PyObject *text = sentence(c, t->name, t->member, format, values);
    va_end(values);
    PyObject *reason = text && cause ? first_line(cause) : NULL;
    PyObject *whole = reason ? PyUnicode_FromFormat("%U: %U", text, reason) : text;
    if (whole) PyErr_SetObject(type, whole);
    if (whole != text) Py_XDECREF(whole);
    Py_XDECREF(reason);
    Py_XDECREF(text);
    if (!cause) return false;

    PyObject *new_type, *new_value, *new_traceback;
    PyErr_Fetch(&new_type, &new_value, &new_traceback);
    PyErr_NormalizeException(&new_type, &new_value, &new_traceback);
    Py_INCREF(cause);
    PyException_SetContext(new_value, cause); /* both steal */
    PyException_SetCause(new_value, cause);
    Py_DECREF(cause_type);
    PyErr_Restore(new_type, new_value, new_traceback);
    return false;
}

bool refuse_dtype(const call *c, const tensor *t, const char *got) {
    static const char *const expected[] = {[HOLDS_FLOATS] = "expected float32, float16 or bfloat16; convert it",
                                           [HOLDS_INTEGERS] = "expected int32 or int64; convert it",
                                           [HOLDS_FLAGS] = "expected bool; convert it"};
    const char *wanted = expected[t->holds];
    const char *conversion = t->holds == HOLDS_FLOATS ? t->kind.framework->to_float32 : NULL;
    const char *such_as = conversion ? ", such as by " : "";
    if (!conversion) conversion = "";
    PyObject *dtype = PyObject_GetAttr(t->object, c->state->names[NAME_DTYPE]);
    if (dtype) {
        refuse(c, t, PyExc_TypeError, "has dtype %S, %s%s%s", dtype, wanted, such_as, conversion);
        Py_DECREF(dtype);
    } else {
        PyErr_Clear();
        refuse(c, t, PyExc_TypeError, "has %s, %s%s%s", got ? got : "another dtype", wanted, such_as, conversion);
    }
    return false;
}

/* 8, (8,) or [8] */
static bool is_shape(PyObject *object) {
    if (PyLong_Check(object)) return true;
    if (!PyTuple_Check(object) && !PyList_Check(object)) return false;
    PyObject *size = PySequence_Size(object) > 0 ? PySequence_GetItem(object, 0) : NULL;
    const bool is = size && PyLong_Check(size);
    Py_XDECREF(size);
    return is;
}

static const char *fix_for(const call *c, const tensor *t) {
    if (strcmp(c->op, "rms_norm") == 0 && strcmp(t->name, "weight") == 0 && is_shape(t->object))
        return "; it takes no shape, as torch's rms_norm does: rms_norm(x, weight)";
    if (PyList_Check(t->object) || PyTuple_Check(t->object)) return "; make an array of it";
    if (!PyObject_HasAttrString(t->object, "weight")) return "";
    if (!PyObject_HasAttrString(t->object, "base_layer")) return "; pass its .weight";
    return "; merge what wraps its base_layer into that, such as by merge_and_unload(), and pass the .weight";
}

/* "torch.nn.modules.linear.Linear"; of Python's own types the name alone. */
static PyObject *full_name(PyTypeObject *type) {
    PyObject *module = PyObject_GetAttrString((PyObject *)type, "__module__");
    PyObject *name = PyType_GetQualName(type);
    PyErr_Clear();
    if (module && name && PyUnicode_Check(module) && PyUnicode_CompareWithASCIIString(module, "builtins") != 0) {
        PyObject *whole = PyUnicode_FromFormat("%U.%U", module, name);
        Py_DECREF(name);
        name = whole;
    }
    Py_XDECREF(module);
    return name;
}

bool refuse_object(const call *c, const tensor *t) {
    PyObject *name = full_name(Py_TYPE(t->object));
    if (name)
        refuse(c, t, PyExc_TypeError,
               "must be a tensor (of torch, NumPy, CuPy or JAX, or with __dlpack__ or __cuda_array_interface__), got "
               "%U%s",
               name, fix_for(c, t));
    Py_XDECREF(name);
    return false;
}

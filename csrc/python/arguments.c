/* arguments.c: see arguments.h. Keywords are compared by address first: the compiler of Python code interns them. */
#include "arguments.h"

#include <string.h>

#include "buffers.h"
#include "steps.h"

/* ---- matching --------------------------------------------------------------------------------------------------- */

bool intern_keywords(module_state *state, const signature *s) {
    for (int i = 0; i < s->count; i++) {
        state->keywords[s->index][i] = PyUnicode_InternFromString(s->parameters[i].name);
        if (!state->keywords[s->index][i]) return false;
    }
    return true;
}

/* "x, weight, eps" */
static PyObject *names_of(const signature *s, int count) {
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < count; i++) {
        PyObject *name = PyUnicode_FromString(s->parameters[i].name);
        if (!name || PyList_Append(list, name) < 0) Py_CLEAR(list);
        Py_XDECREF(name);
    }
    PyObject *comma = PyUnicode_FromString(", ");
    PyObject *text = list && comma ? PyUnicode_Join(comma, list) : NULL;
    Py_XDECREF(comma);
    Py_XDECREF(list);
    return text;
}

/* `likely` is where to look first: callers tend to keep to the order of the signature. */
static int find_keyword(PyObject *const *keywords, int count, PyObject *name, int likely) {
    for (int i = likely; i < count; i++)
        if (keywords[i] == name) return i;
    for (int i = 0; i < likely; i++)
        if (keywords[i] == name) return i;
    for (int i = 0; i < count; i++)
        if (PyUnicode_Compare(keywords[i], name) == 0) return i;
    return -1;
}

static bool refuse_surplus(const signature *s, Py_ssize_t count) {
    const char *by_name = s->count > s->positional ? s->parameters[s->positional].name : NULL;
    PyObject *known_names = names_of(s, s->positional);
    if (known_names)
        PyErr_Format(PyExc_TypeError, "%s: takes at most %d positional argument%s (%U), got %zd%s%s%s", s->op,
                     s->positional, s->positional == 1 ? "" : "s", known_names, count,
                     by_name ? "; the others are given by name, such as " : "", by_name ? by_name : "",
                     by_name ? "=" : "");
    Py_XDECREF(known_names);
    return false;
}

/* One character more, less, or another one, or two neighbours swapped. */
static bool is_one_edit_away(const char *a, const char *b) {
    while (*a && *a == *b) a++, b++;
    size_t left_a = strlen(a), left_b = strlen(b);
    while (left_a && left_b && a[left_a - 1] == b[left_b - 1]) left_a--, left_b--;
    const bool swapped = left_a == 2 && left_b == 2 && a[0] == b[1] && a[1] == b[0];
    return (left_a <= 1 && left_b <= 1) || swapped;
}

static bool refuse_unknown(const signature *s, PyObject *name) {
    const char *text = PyUnicode_AsUTF8AndSize(name, NULL), *meant = NULL;
    if (!text) PyErr_Clear(); /* half a character */
    for (int i = 0; text && strlen(text) > 2 && i < s->count && !meant; i++)
        if (is_one_edit_away(text, s->parameters[i].name)) meant = s->parameters[i].name;
    PyObject *known_names = names_of(s, s->count);
    if (known_names)
        PyErr_Format(PyExc_TypeError, "%s: has no argument %U%s%s; it takes %U", s->op, name,
                     meant ? ", did you mean " : "", meant ? meant : "", known_names);
    Py_XDECREF(known_names);
    return false;
}

/* values[i]: what was given for parameter i (borrowed), or NULL. */
static bool match(const call *c, const signature *s, PyObject *const *given, Py_ssize_t count, PyObject *names,
                  PyObject **values) {
    if (count > s->positional) return refuse_surplus(s, count);
    for (Py_ssize_t i = 0; i < count; i++) values[i] = given[i];
    const Py_ssize_t keywords = names ? PyTuple_Size(names) : 0;
    int likely = (int)count;
    for (Py_ssize_t k = 0; k < keywords; k++) {
        PyObject *name = PyTuple_GetItem(names, k);
        const int i = find_keyword(c->state->keywords[s->index], s->count, name, likely);
        if (i < 0) return refuse_unknown(s, name);
        if (values[i]) {
            PyErr_Format(PyExc_TypeError, "%s: %U is given twice, by position and by name", s->op, name);
            return false;
        }
        values[i] = given[count + k];
        likely = i + 1;
    }
    for (int i = 0; i < s->required; i++) {
        if (!values[i]) {
            PyErr_Format(PyExc_TypeError, "%s: %s is missing (argument %d)", s->op, s->parameters[i].name, i + 1);
            return false;
        }
    }
    return true;
}

bool parse(call *c, const signature *s, void *args, PyObject *const *given, Py_ssize_t count, PyObject *names) {
    PyObject *values[MAX_PARAMETERS] = {NULL};
    if (!check_stack(c)) return false;
    c->given = given;
    c->given_count = count;
    c->given_names = names;
    if (!match(c, s, given, count, names, values)) return false;
    for (int i = 0; i < s->count; i++) {
        const parameter *p = &s->parameters[i];
        if (values[i] && !p->convert(c, p, values[i], (char *)args + p->offset)) return false;
    }
    end_step(c, STEP_READ);
    return true;
}

/* What the object's own dict has is found there at once; a subclass may have it as a property. */
static PyObject *attribute(PyObject *object, PyObject *own, PyObject *name) {
    PyObject *value = item_of(own, name);
    return value || PyErr_Occurred() ? value : PyObject_GetAttr(object, name);
}

bool read_attributes(call *c, const signature *s, void *args, PyObject *object) {
    PyObject *own = PyObject_GenericGetDict(object, NULL);
    bool ok = own != NULL;
    for (int i = 0; ok && i < s->count; i++) {
        const parameter *p = &s->parameters[i];
        PyObject *value = attribute(object, own, c->state->keywords[s->index][i]);
        ok = value && p->convert(c, p, value, (char *)args + p->offset);
        Py_XDECREF(value);
    }
    Py_XDECREF(own);
    end_step(c, STEP_READ);
    return ok;
}

/* ---- converters ------------------------------------------------------------------------------------------------- */

static bool refuse_type(const call *c, const parameter *p, const char *expected, PyObject *value) {
    if (is_about_no_argument()) return false;
    PyErr_Clear();
    PyObject *name = PyType_GetQualName(Py_TYPE(value));
    if (name) refuse_argument(c, p->name, PyExc_TypeError, "must be %s, got %U", expected, name);
    Py_XDECREF(name);
    return false;
}

bool to_tensor(call *c, const parameter *p, PyObject *value, void *target) {
    return take_tensor(c, p->name, -1, value, target);
}

bool to_optional_tensor(call *c, const parameter *p, PyObject *value, void *target) {
    return value == Py_None || take_tensor(c, p->name, -1, value, target);
}

/* A list may change under our hands; its members are taken, and so kept, one by one. */
bool to_tensors(call *c, const parameter *p, PyObject *value, void *target) {
    mv_view *views = target;
    if (!PyTuple_Check(value) && !PyList_Check(value)) return take_tensor(c, p->name, -1, value, &views[0]);
    PyObject *members = PySequence_Tuple(value);
    if (!members) return false;
    bool ok = PyTuple_Size(members) == 3;
    if (!ok)
        refuse_argument(c, p->name, PyExc_ValueError, "has %zd members, expected one packed tensor or three (q, k, v)",
                        PyTuple_Size(members));
    for (int i = 0; ok && i < 3; i++) ok = take_tensor(c, p->name, i, PyTuple_GetItem(members, i), &views[i]);
    Py_DECREF(members);
    return ok;
}

bool to_optional_tensors(call *c, const parameter *p, PyObject *value, void *target) {
    return value == Py_None || to_tensors(c, p, value, target);
}

bool to_number(call *c, const parameter *p, PyObject *value, void *target) {
    const double number = PyBool_Check(value) ? -1.0 : PyFloat_AsDouble(value);
    if (PyBool_Check(value) || (number == -1.0 && PyErr_Occurred())) {
        if (PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_OverflowError)) {
            PyErr_Clear();
            return refuse_argument(c, p->name, PyExc_ValueError, "is too large for a float");
        }
        return refuse_type(c, p, "a number", value);
    }
    *(double *)target = number;
    return true;
}

bool to_integer(call *c, const parameter *p, PyObject *value, void *target) {
    PyObject *index = PyBool_Check(value) ? NULL : PyNumber_Index(value);
    if (!index) return refuse_type(c, p, "an integer", value);
    const long long number = PyLong_AsLongLong(index);
    Py_DECREF(index);
    if (number == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        return refuse_argument(c, p->name, PyExc_ValueError, "is %R, expected less than 2^63", value);
    }
    *(int64_t *)target = number;
    return true;
}

/* 0 stands for None, so a 0 that was given must not pass for it. */
bool to_optional_integer(call *c, const parameter *p, PyObject *value, void *target) {
    if (value == Py_None) return true;
    if (!to_integer(c, p, value, target)) return false;
    const int64_t number = *(int64_t *)target;
    return number > 0 ||
           refuse_argument(c, p->name, PyExc_ValueError, "is %lld, expected at least 1", (long long)number);
}

bool to_flag(call *c, const parameter *p, PyObject *value, void *target) {
    if (!PyBool_Check(value)) return refuse_type(c, p, "True or False", value);
    *(bool *)target = value == Py_True;
    return true;
}

static bool to_choice(call *c, const parameter *p, PyObject *value, const char *const *choices, const char *expected,
                      int *chosen) {
    if (!PyUnicode_Check(value)) return refuse_type(c, p, expected, value);
    for (int i = 0; choices[i]; i++) {
        if (PyUnicode_CompareWithASCIIString(value, choices[i]) == 0) {
            *chosen = i;
            return true;
        }
    }
    return refuse_argument(c, p->name, PyExc_ValueError, "is %R, expected %s", value, expected);
}

bool to_rounding(call *c, const parameter *p, PyObject *value, void *target) {
    static const char *const choices[] = {[MV_ROUNDING_HF] = "hf", [MV_ROUNDING_FP32] = "fp32", NULL};
    int chosen = 0;
    if (!to_choice(c, p, value, choices, "\"hf\" or \"fp32\"", &chosen)) return false;
    *(mv_rounding *)target = (mv_rounding)chosen;
    return true;
}

bool to_weight_layout(call *c, const parameter *p, PyObject *value, void *target) {
    static const char *const choices[] = {
        [MV_LAYOUT_AUTO] = "auto", [MV_LAYOUT_OUT_IN] = "out_in", [MV_LAYOUT_IN_OUT] = "in_out", NULL};
    int chosen = 0;
    if (!to_choice(c, p, value, choices, "\"auto\", \"out_in\" or \"in_out\"", &chosen)) return false;
    *(mv_weight_layout *)target = (mv_weight_layout)chosen;
    return true;
}

/* The text lives as long as `value`, which the caller of the op holds. */
bool to_optional_text(call *c, const parameter *p, PyObject *value, void *target) {
    if (value == Py_None) return true;
    if (!PyUnicode_Check(value)) return refuse_type(c, p, "a str or None", value);
    Py_ssize_t size;
    const char *text = PyUnicode_AsUTF8AndSize(value, &size);
    if (!text || strlen(text) != (size_t)size) {
        PyErr_Clear();
        return refuse_argument(c, p->name, PyExc_ValueError, "is %R, expected the name of a kernel", value);
    }
    *(const char **)target = text;
    return true;
}

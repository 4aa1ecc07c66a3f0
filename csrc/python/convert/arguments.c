/* arguments.c: see arguments.h. Keywords are compared by address first: the compiler of Python code interns them. */
#include "arguments.h"

#include <math.h>
#include <string.h>

#include "../base/nesting.h"
#include "../base/refusals.h"
#include "../base/steps.h"
#include "buffers.h"

/* ---- matching --------------------------------------------------------------------------------------------------- */

/* Of a call that reads by this table: as many as can be given, and the workspace. */
static int most_tensors(const signature *s) {
    int count = s->beside ? most_tensors(s->beside) : 1;
    for (int i = 0; i < s->count; i++) {
        const value_type type = s->parameters[i].kind->type;
        if (type == TENSOR || type == INTEGERS || type == FLAGS || type == TENSORS)
            count += count_views(s->parameters[i].kind);
    }
    return count;
}

bool prepare_signature(module_state *state, const signature *s, int index) {
    if (!s || s->index != (signature_index)index) {
        PyErr_Format(PyExc_ImportError, "minivllm._C: signature %d is not at its place in the list", index);
        return false;
    }
    if (most_tensors(s) > MAX_TENSORS) {
        PyErr_Format(PyExc_ImportError, "minivllm._C: %s may take %d tensors, more than MAX_TENSORS, which is %d",
                     s->op, most_tensors(s), MAX_TENSORS);
        return false;
    }
    for (int i = 0; i < s->count; i++) {
        state->keywords[index][i] = PyUnicode_InternFromString(s->parameters[i].name);
        if (!state->keywords[index][i]) return false;
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
    for (int i = (int)count; i < s->required; i++) {
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
        if (!values[i]) continue;
        const parameter *p = &s->parameters[i];
        if (!p->kind->convert(c, p, values[i], (char *)args + p->offset)) return false;
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
        ok = value && p->kind->convert(c, p, value, (char *)args + p->offset);
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

static bool to_tensor(call *c, const parameter *p, PyObject *value, void *target) {
    return take_tensor(c, p->name, -1, value, target);
}

static bool to_optional_tensor(call *c, const parameter *p, PyObject *value, void *target) {
    return value == Py_None || take_tensor(c, p->name, -1, value, target);
}

static bool to_integers(call *c, const parameter *p, PyObject *value, void *target) {
    return (p->kind->optional && value == Py_None) || take_tensor_of(c, p->name, HOLDS_INTEGERS, value, target);
}

static bool to_optional_flags(call *c, const parameter *p, PyObject *value, void *target) {
    return value == Py_None || take_tensor_of(c, p->name, HOLDS_FLAGS, value, target);
}

static bool refuse_count(const call *c, const parameter *p, Py_ssize_t got) {
    const bool three = count_names(p->kind) == 3;
    const char *const *names = p->kind->names;
    return refuse_argument(c, p->name, PyExc_ValueError,
                           "has %zd members, expected one packed tensor or %s (%s, %s%s%s)", got,
                           three ? "three" : "two", names[0], names[1], three ? ", " : "", three ? names[2] : "");
}

/* A list may change under our hands; its members are taken, and so kept, one by one. */
static bool to_tensors(call *c, const parameter *p, PyObject *value, void *target) {
    mv_view *views = target;
    if (!PyTuple_Check(value) && !PyList_Check(value)) return take_tensor(c, p->name, -1, value, &views[0]);
    PyObject *members = PySequence_Tuple(value);
    if (!members) return false;
    const int count = count_names(p->kind);
    bool ok = PyTuple_Size(members) == count || refuse_count(c, p, PyTuple_Size(members));
    for (int i = 0; ok && i < count; i++) ok = take_tensor(c, p->name, i, PyTuple_GetItem(members, i), &views[i]);
    Py_DECREF(members);
    return ok;
}

static bool to_optional_tensors(call *c, const parameter *p, PyObject *value, void *target) {
    return value == Py_None || to_tensors(c, p, value, target);
}

static bool to_number(call *c, const parameter *p, PyObject *value, void *target) {
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

/* 0 stands for None. */
static bool to_optional_number(call *c, const parameter *p, PyObject *value, void *target) {
    if (value == Py_None) return true;
    if (!to_number(c, p, value, target)) return false;
    const double number = *(double *)target;
    if (isfinite(number) && number > 0) return true;
    PyObject *given = PyObject_Str(value);
    if (given) refuse_argument(c, p->name, PyExc_ValueError, "is %U, expected a finite number > 0", given);
    Py_XDECREF(given);
    return false;
}

static bool to_integer(call *c, const parameter *p, PyObject *value, void *target) {
    PyObject *index = PyLong_CheckExact(value) ? Py_NewRef(value) : PyBool_Check(value) ? NULL : PyNumber_Index(value);
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
static bool to_optional_integer(call *c, const parameter *p, PyObject *value, void *target) {
    if (value == Py_None) return true;
    if (!to_integer(c, p, value, target)) return false;
    const int64_t number = *(int64_t *)target;
    return number > 0 ||
           refuse_argument(c, p->name, PyExc_ValueError, "is %lld, expected at least 1", (long long)number);
}

static bool to_flag(call *c, const parameter *p, PyObject *value, void *target) {
    if (!PyBool_Check(value)) return refuse_type(c, p, "True or False", value);
    *(bool *)target = value == Py_True;
    return true;
}

/* "auto", "out_in" or "in_out" */
static PyObject *text_of_choices(const char *const *choices) {
    PyObject *text = PyUnicode_FromFormat("\"%s\"", choices[0]);
    for (int i = 1; text && choices[i]; i++) {
        PyObject *longer = PyUnicode_FromFormat(choices[i + 1] ? "%U, \"%s\"" : "%U or \"%s\"", text, choices[i]);
        Py_DECREF(text);
        text = longer;
    }
    return text;
}

static bool refuse_choice(const call *c, const parameter *p, PyObject *value) {
    PyObject *expected = text_of_choices(p->kind->names + p->kind->optional);
    const char *text = expected ? PyUnicode_AsUTF8AndSize(expected, NULL) : NULL;
    if (text && !PyUnicode_Check(value))
        refuse_type(c, p, text, value);
    else if (text)
        refuse_argument(c, p->name, PyExc_ValueError, "is %R, expected %U", value, expected);
    Py_XDECREF(expected);
    return false;
}

/* None is the first choice where it is one. */
static bool to_choice(call *c, const parameter *p, PyObject *value, void *target) {
    const char *const *choices = p->kind->names;
    if (p->kind->optional && value == Py_None) return true;
    for (int i = p->kind->optional; PyUnicode_Check(value) && choices[i]; i++) {
        if (PyUnicode_CompareWithASCIIString(value, choices[i]) == 0) {
            *(int *)target = i;
            return true;
        }
    }
    return refuse_choice(c, p, value);
}

/* The text lives as long as `value`, which the caller of the op holds. */
static bool to_optional_text(call *c, const parameter *p, PyObject *value, void *target) {
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

_Static_assert(sizeof(mv_rounding) == sizeof(int) && sizeof(mv_weight_layout) == sizeof(int) &&
                   sizeof(mv_approximate) == sizeof(int) && sizeof(mv_activation) == sizeof(int) &&
                   sizeof(mv_cache_layout) == sizeof(int),
               "what to_choice() writes");
static const char *const roundings[] = {
    [MV_ROUNDING_HF] = "hf", [MV_ROUNDING_HF_ONCE] = "hf_once", [MV_ROUNDING_FP32] = "fp32", NULL};
static const char *const weight_layouts[] = {
    [MV_LAYOUT_AUTO] = "auto", [MV_LAYOUT_OUT_IN] = "out_in", [MV_LAYOUT_IN_OUT] = "in_out", NULL};
static const char *const approximations[] = {[MV_APPROXIMATE_TANH] = "tanh", [MV_APPROXIMATE_NONE] = "none", NULL};
static const char *const activations[] = {[MV_SILU] = "silu", [MV_GELU_TANH] = "gelu_tanh", [MV_GELU] = "gelu", NULL};
static const char *const cache_layouts[] = {
    [MV_CACHE_STATIC] = "None", [MV_CACHE_NHD] = "NHD", [MV_CACHE_HND] = "HND", NULL};
const char *const qkv_members[] = {"q", "k", "v", NULL};
static const char *const gate_up_members[] = {"gate", "up", NULL};

const value_kind tensor_value = {TENSOR, false, to_tensor, NULL};
const value_kind optional_tensor_value = {TENSOR, true, to_optional_tensor, NULL};
const value_kind tensors_value = {TENSORS, false, to_tensors, qkv_members};
const value_kind optional_tensors_value = {TENSORS, true, to_optional_tensors, qkv_members};
const value_kind pair_value = {TENSORS, false, to_tensors, gate_up_members};
const value_kind optional_pair_value = {TENSORS, true, to_optional_tensors, gate_up_members};
const value_kind integers_value = {INTEGERS, false, to_integers, NULL};
const value_kind optional_integers_value = {INTEGERS, true, to_integers, NULL};
const value_kind optional_flags_value = {FLAGS, true, to_optional_flags, NULL};
const value_kind optional_number_value = {NUMBER, true, to_optional_number, NULL};
const value_kind number_value = {NUMBER, false, to_number, NULL};
const value_kind integer_value = {INTEGER, false, to_integer, NULL};
const value_kind optional_integer_value = {INTEGER, true, to_optional_integer, NULL};
const value_kind flag_value = {FLAG, false, to_flag, NULL};
const value_kind optional_text_value = {TEXT, true, to_optional_text, NULL};
const value_kind rounding_value = {CHOICE, false, to_choice, roundings};
const value_kind weight_layout_value = {CHOICE, false, to_choice, weight_layouts};
const value_kind approximate_value = {CHOICE, false, to_choice, approximations};
const value_kind activation_value = {CHOICE, false, to_choice, activations};
const value_kind cache_layout_value = {CHOICE, true, to_choice, cache_layouts};

/* ---- what Python is told ---------------------------------------------------------------------------------------- */

static const char *const type_names[] = {
    [TENSOR] = "tensor",   [TENSORS] = "tensors", [INTEGERS] = "integers", [FLAGS] = "flags", [NUMBER] = "number",
    [INTEGER] = "integer", [FLAG] = "flag",       [CHOICE] = "choice",     [TEXT] = "text",   [HELD] = "held"};
static const char *const role_names[] = {
    [ROWS] = "rows", [WEIGHT] = "weight", [OUTPUT] = "output", [IN_PLACE] = "in place", [OPTION] = "option"};

/* What is in an args struct, as Python would give it. */
static PyObject *value_of(const parameter *p, const void *args) {
    const void *field = (const char *)args + p->offset;
    switch (p->kind->type) {
    case NUMBER: {
        const double number = *(const double *)field;
        return p->kind->optional && number == 0 ? Py_NewRef(Py_None) : PyFloat_FromDouble(number);
    }
    case INTEGER: {
        const int64_t number = *(const int64_t *)field;
        return p->kind->optional && number == 0 ? Py_NewRef(Py_None) : PyLong_FromLongLong(number);
    }
    case FLAG: return PyBool_FromLong(*(const bool *)field);
    case CHOICE: {
        const int choice = *(const int *)field;
        return p->kind->optional && choice == 0 ? Py_NewRef(Py_None) : PyUnicode_FromString(p->kind->names[choice]);
    }
    case TEXT: {
        const char *text = *(const char *const *)field;
        return text ? PyUnicode_FromString(text) : Py_NewRef(Py_None);
    }
    default: return Py_NewRef(Py_None);
    }
}

/* Of TENSORS, the names of the members of a tuple; () of all others. */
static PyObject *members_of(const value_kind *kind) {
    const int count = kind->type == TENSORS ? count_names(kind) : 0;
    PyObject *members = PyTuple_New(count);
    for (int i = 0; members && i < count; i++) {
        PyObject *name = PyUnicode_FromString(kind->names[i]);
        if (!name || PyTuple_SetItem(members, i, name) < 0) Py_CLEAR(members);
    }
    return members;
}

PyObject *described(const signature *s) {
    PyObject *rows = PyTuple_New(s->count);
    for (int i = 0; rows && i < s->count; i++) {
        const parameter *p = &s->parameters[i];
        PyObject *row =
            Py_BuildValue("(sssOOONN)", p->name, type_names[p->kind->type], role_names[p->role],
                          p->kind->optional ? Py_True : Py_False, i < s->required ? Py_True : Py_False,
                          i < s->positional ? Py_True : Py_False, value_of(p, s->defaults), members_of(p->kind));
        if (!row || PyTuple_SetItem(rows, i, row) < 0) Py_CLEAR(rows);
    }
    return rows;
}

/* arguments.h: from a METH_FASTCALL | METH_KEYWORDS call to an op's args struct, by a table.
 *
 * A row of the table is all that there is to know of a parameter: its name, what its values are, what the op does with
 * them, and where in the args struct they go. Reading a call, XLA's attributes, the schemas of torch and the tests of
 * every face are made from it. The defaults are what an args struct of its own holds. */
#ifndef MV_ARGUMENTS_H
#define MV_ARGUMENTS_H

#include "../base/call.h"

typedef struct parameter parameter;

/* The C types: mv_view, mv_view[] (one, or a tuple of as many as its kind has names), mv_view of integers, mv_view of
 * flags, double, int64_t, bool, an enum, const char *. HELD: what only a layer hands to itself. */
typedef enum { TENSOR, TENSORS, INTEGERS, FLAGS, NUMBER, INTEGER, FLAG, CHOICE, TEXT, HELD } value_type;

typedef struct {
    value_type type;
    bool optional; /* may be None: an absent tensor, 0 or NULL */
    bool (*convert)(call *c, const parameter *p, PyObject *value, void *target);
    const char *const *names; /* of a CHOICE, by their numbers, or of the members of TENSORS; ends with NULL */
} value_kind;

static inline int count_names(const value_kind *kind) {
    int count = 0;
    while (kind->names && kind->names[count]) count++;
    return count;
}
/* How many mv_views there are for tensors of this kind. */
static inline int count_views(const value_kind *kind) { return kind->type == TENSORS ? count_names(kind) : 1; }

extern const char *const qkv_members[];

extern const value_kind tensor_value, optional_tensor_value;
extern const value_kind tensors_value, optional_tensors_value; /* (q, k, v)  */
extern const value_kind pair_value, optional_pair_value;       /* (gate, up) */
extern const value_kind number_value, integer_value, optional_integer_value, flag_value, optional_text_value;
extern const value_kind integers_value, optional_integers_value; /* tensors of int32 or int64 */
extern const value_kind optional_flags_value;                    /* of bool */
extern const value_kind optional_number_value, rounding_value, weight_layout_value, approximate_value, activation_value,
    cache_layout_value;

/* What an op does with a parameter. ROWS: it reads a tensor whose rows do not depend on each other. WEIGHT: it reads a
 * tensor that is the same for every row. OUTPUT: it writes to it, and makes it where it is absent. IN_PLACE: it reads
 * it and writes to it. OPTION: no tensor. */
typedef enum { ROWS, WEIGHT, OUTPUT, IN_PLACE, OPTION } parameter_role;

struct parameter {
    const char *name;
    const value_kind *kind;
    parameter_role role;
    size_t offset; /* of the target in the args struct */
};

typedef struct signature signature;
struct signature {
    const char *op;
    signature_index index;
    int required;   /* the first so many parameters have no default     */
    int positional; /* those after the first so many are keyword-only   */
    int count;
    const parameter *parameters;
    const void *defaults;    /* an args struct as it is before a call is read; NULL: of no op */
    const signature *beside; /* what the same call reads as well; NULL: nothing               */
};

#define LENGTH(array) ((int)(sizeof(array) / sizeof((array)[0])))

/* The signature of the table <name>_parameters; what follows are further fields, if there are any. */
#define SIGNATURE(name, place, function, ...)                                                                          \
    _Static_assert(LENGTH(name##_parameters) <= MAX_PARAMETERS, #name " has more than MAX_PARAMETERS parameters");     \
    const signature name##_signature = {.op = function,                                                                \
                                        .index = place,                                                                \
                                        .count = LENGTH(name##_parameters),                                            \
                                        .parameters = name##_parameters,                                               \
                                        __VA_ARGS__}

/* When the module is made: are the tables large enough? Makes the keywords. False with an exception set. */
bool prepare_signature(module_state *state, const signature *s, int index);
/* Fills `args`; false with an exception set, or where the call is handed over. */
bool parse(call *c, const signature *s, void *args, PyObject *const *values, Py_ssize_t count, PyObject *names);
/* The same from the attributes of an object, which must have all of them. */
bool read_attributes(call *c, const signature *s, void *args, PyObject *object);
/* ((name, type, role, optional, required, positional, default, members), ...), with texts as Python knows them. */
PyObject *described(const signature *s);

#endif

/* types.h: which framework a tensor is of. */
#ifndef MV_PYTHON_TYPES_H
#define MV_PYTHON_TYPES_H

#include "../base/call.h"

/* Fills t->kind by what t->object is; false with an exception set, also for what is no tensor. */
bool classify_tensor(call *c, tensor *t);

/* The same, quickly where its type has been met before. */
static inline bool find_framework(call *c, tensor *t) {
    PyTypeObject *type = Py_TYPE(t->object);
    for (int i = 0; i < MAX_TYPES; i++) {
        const type_slot *slot = &c->state->types[i];
        PyTypeObject *known_type = atomic_load_explicit(&slot->type, memory_order_acquire);
        if (!known_type) break;
        if (known_type == type) {
            t->kind = slot->kind;
            return true;
        }
    }
    return classify_tensor(c, t);
}

#endif

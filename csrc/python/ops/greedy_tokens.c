/* greedy_tokens.c: the next token of each row of logits, and what follows the choice. */
#include "../base/refusals.h"
#include "../base/steps.h"
#include "../convert/results.h"
#include "ops.h"
#include "run.h"

#define GREEDY(field, kind, role)                                                                                      \
    { #field, &kind, role, offsetof(mv_greedy_tokens_args, field) }

static const parameter greedy_tokens_parameters[] = {
    GREEDY(logits, tensor_value, ROWS),
    GREEDY(finished, optional_flags_value, IN_PLACE),
    GREEDY(ends, optional_flags_value, WEIGHT),
    GREEDY(pad, optional_integers_value, WEIGHT),
    GREEDY(history, optional_integers_value, IN_PLACE),
    GREEDY(counts, optional_integers_value, IN_PLACE),
    GREEDY(positions, optional_integers_value, IN_PLACE),
    GREEDY(out, optional_integers_value, OUTPUT),
    KERNEL_PARAMETER(mv_greedy_tokens_args),
};
static const mv_greedy_tokens_args greedy_tokens_defaults = {.call.op = "greedy_tokens"};
SIGNATURE(greedy_tokens, SIGNATURE_greedy_tokens, "greedy_tokens", .required = 1, .positional = 1,
          .defaults = &greedy_tokens_defaults);

static PyObject *run_greedy_tokens(call *c, mv_greedy_tokens_args *a) {
    mv_plan plan;
    mv_error error;
    a->call.stream = c->stream;
    if (!check_status(mv_greedy_tokens(a, &plan, &error), &error)) return NULL;
    end_step(c, STEP_PLAN);
    if (!RUN_PLAN(c, &plan, &a->logits, &a->out)) return NULL;
    const mv_view *const in_place[] = {&a->finished, &a->history, &a->counts, &a->positions};
    for (int i = 0; i < LENGTH(in_place); i++)
        if (is_given(in_place[i]) && !note_written(c, in_place[i])) return NULL;
    return returned(c, &a->out, &a->logits);
}
FACE(greedy_tokens, mv_greedy_tokens_args)

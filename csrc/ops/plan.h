/* plan.h: what is behind an mv_plan: from the views of an op to tasks, and the kernels that run them.
 *
 * The leading dimensions of x, residual, out and residual_out have one shape but each its own strides. Dimensions that
 * every one of them steps through evenly are merged; two that remain are a kernel's (outer, inner). Where more remain,
 * the op runs in pieces, once for each index of the others, and reads the weights again for each. An op may also divide
 * its outputs into parts, one task each. */
#ifndef MV_PLAN_H
#define MV_PLAN_H

#include "checks.h"
#include "dispatch.h"

enum { MV_MAX_PARTS = 3 };

typedef struct {
    int64_t size;
    int64_t x, residual, out, residual_out; /* strides */
} mv_lead;

typedef struct {
    mv_task task;         /* for index 0 of the loop over the leads */
    int64_t first_output; /* of the part, in a row of out */
    mv_choice choice;
} mv_part;

typedef struct __attribute__((may_alias)) { /* it lives in mv_plan.state */
    const char *op;
    const char *kernel; /* the name that forces one, or NULL */
    const mv_list *list;
    bool out_later, residual_out_later; /* mv_run() is told where they are */
    int leads;                          /* what the op loops over, outside the tasks' own two dimensions */
    int parts;                          /* 0 where there is nothing to do */
    mv_part part[MV_MAX_PARTS];
    mv_lead lead[MV_MAX_DIMS];
} mv_plan_state;
_Static_assert(sizeof(mv_plan_state) <= sizeof((mv_plan *)0)->state, "mv_plan.state is too small");

static inline mv_plan_state *mv_state(mv_plan *plan) { return (mv_plan_state *)plan->state; }

/* What an op reads and writes row by row. The views are checked already. */
typedef struct {
    const mv_view *x, *residual, *out, *residual_out;
    int64_t columns; /* of out */
} mv_row_views;

/* Begins a plan of one part, whose task has its device, rows, tokens, hidden and dtype; or of none, without tokens. An
 * output that is absent is planned for as the fresh memory that mv_memory promises. */
mv_status mv_start_plan(mv_plan *plan, const mv_list *list, const char *op, const mv_call *call,
                        const mv_row_views *rows, mv_error *error);
/* Makes part[index] of part[0], without blocks: for the outputs from `first_output` on. */
mv_task *mv_add_part(mv_plan *plan, int index, int64_t first_output);
/* Chooses the kernels. */
mv_status mv_finish_plan(mv_plan *plan, mv_error *error);

#endif

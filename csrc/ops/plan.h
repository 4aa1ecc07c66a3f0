/* plan.h: what is behind an mv_plan: from the views of an op to tasks, and the kernels that run them.
 *
 * What an op reads and writes row by row has one shape of leading dimensions but each its own strides. Dimensions that
 * every tensor steps through evenly are merged; two that remain are a kernel's (outer, inner). Where more remain,
 * the op runs in pieces, once for each index of the others, and reads the weights again for each. An op may also divide
 * its outputs into parts, one task each. */
#ifndef MV_PLAN_H
#define MV_PLAN_H

#include "checks.h"
#include "dispatch.h"

enum { MV_MAX_PARTS = 3, MV_MAX_ROW_VIEWS = 8 };

/* A tensor that an op reads or writes row by row. The view is checked already. */
typedef struct {
    const mv_view *view; /* absent: there is none; but an output is then planned for as the fresh memory of mv_memory */
    int64_t columns;
    size_t place;       /* of its mv_rows in mv_task: offsetof() */
    const char *output; /* its name, where the op writes it; else NULL */
    bool divided;       /* its columns are the outputs of the linear layer, of which each part has some */
    bool optional;      /* it is not written where there is no memory for it */
    bool is_index;      /* an output that has no columns, but one int64 for each row; columns is 1 then */
    bool has_heads;     /* of x: what is in front of the columns is no dimension of the rows, but of their heads */
    const int *along;   /* for each dimension of x's rows that of the view, -1: it is the same all along; NULL: as x */
} mv_row_view;

/* A tensor that is read, whose mv_rows are that field of the task. */
#define MV_READS(view, columns, field)                                                                                 \
    { view, columns, offsetof(mv_task, field), .output = NULL }
/* The sum that a norm sees, which an op with a residual can give back. */
#define MV_RESIDUAL_OUT(view, hidden)                                                                                  \
    { view, hidden, offsetof(mv_task, norm.residual_out), .output = "residual_out", .optional = true }

/* What is kept of it. */
typedef struct {
    const char *output;
    size_t place;
    mv_dtype dtype;
    bool divided, optional;
    bool later; /* mv_run() is told where it is */
} mv_row_place;

typedef struct {
    int64_t size, stride[MV_MAX_ROW_VIEWS];
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
    int rows;
    int leads; /* what the op loops over, outside the tasks' own two dimensions */
    int parts; /* 0 where there is nothing to do */
    mv_row_place row[MV_MAX_ROW_VIEWS];
    mv_part part[MV_MAX_PARTS];
    mv_lead lead[MV_MAX_DIMS];
} mv_plan_state;
_Static_assert(sizeof(mv_plan_state) <= sizeof((mv_plan *)0)->state, "mv_plan.state is too small");

static inline mv_plan_state *mv_state(mv_plan *plan) { return (mv_plan_state *)plan->state; }

/* Begins a plan of one part, whose task has its device, rows, tokens, hidden and dtype; or of none, without tokens. The
 * first of the `count` rows are those of x; the plan's outputs are in the order of the others. What a task has for one
 * op alone, its union, is left to that op, before this or after. */
mv_status mv_start_plan(mv_plan *plan, const mv_list *list, const char *op, const mv_call *call,
                        const mv_row_view *rows, int count, mv_error *error);
/* Makes part[index] of part[0], without blocks: for the outputs from `first_output` on. */
mv_task *mv_add_part(mv_plan *plan, int index, int64_t first_output);
/* Chooses the kernels. */
mv_status mv_finish_plan(mv_plan *plan, mv_error *error);

#endif

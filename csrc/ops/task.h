/* task.h: from the views of an op to tasks for its kernels.
 *
 * The leading dimensions of x, residual, out and residual_out have one shape but each its own strides. Dimensions that
 * every one of them steps through evenly are merged; two that remain are a kernel's (outer, inner). Where more remain,
 * the op runs once for each index of the others. */
#ifndef MV_TASK_H
#define MV_TASK_H

#include "checks.h"
#include "dispatch.h"

typedef struct {
    int64_t size;
    int64_t x, residual, out, residual_out; /* strides; 0 where the tensor is absent */
} mv_lead;

typedef struct {
    mv_lead lead[MV_MAX_DIMS]; /* what the op loops over, outside the task's own two dimensions */
    int leads;
    mv_task task; /* its rows for index 0 of the loop */
} mv_tasks;

/* Fills the rows, tokens, hidden, dtype, device of tasks->task. The views are checked already; absent ones are left out. */
void mv_plan_rows(mv_tasks *tasks, const mv_view *x, const mv_view *residual, const mv_view *out,
                  const mv_view *residual_out);

/* The number of tasks, and the i-th. */
int64_t mv_task_count(const mv_tasks *tasks);
mv_task mv_task_at(const mv_tasks *tasks, int64_t i);

/* eps and weight_offset: finite, and eps >= 0. */
mv_status mv_check_numbers(const char *op, double eps, double weight_offset, mv_rounding rounding, mv_error *error);

#endif

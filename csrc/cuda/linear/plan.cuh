/* plan.cuh: the plan of two launches, a norm and a product: y goes through the workspace. Without a norm it is the
 * product alone, of x; only an x that does not lie as y would is copied first. */
#pragma once

#include "cuda/arch/vec.cuh"
#include "cuda/decision.cuh"
#include "kernel.h"

/* Of a row whose product has no pairs of outputs. */
constexpr const char *kNotGated = "it does not multiply up by the activation of the gate";

/* Of a row that has a norm in front of its product, and only a rounding behind it. */
static inline const char *norm_linear_why_not(const mv_task *task) {
    if (task->linear.plain_x) return "it multiplies normalised rows only";
    if (task->linear.gated) return kNotGated;
    return task->linear.addend.data ? "it adds no residual to its outputs" : nullptr;
}

/* Is x multiplied as it is, and where it is: its rows aligned, and without gaps? */
static inline bool reads_x(const mv_task *task) {
    const int64_t inner = task->inner < task->tokens ? task->inner : task->tokens, hidden = task->hidden;
    const bool dense = (inner == 1 || task->x.inner_stride == hidden) &&
                       (inner == task->tokens || task->x.outer_stride == inner * hidden);
    return task->linear.plain_x && dense && is_aligned16(task->x.data) &&
           hidden * static_cast<int64_t>(mv_dtype_bytes(task->dtype)) % 16 == 0;
}

struct PlanTasks {
    mv_task norm, product;
};

/* The norm's y is what the product's x is. */
static inline PlanTasks plan_tasks(const mv_task *task) {
    const mv_rows y = {task->workspace, task->inner * task->hidden, task->hidden};
    PlanTasks tasks = {*task, *task};
    tasks.norm.out = y;
    tasks.norm.linear.outputs = 0;
    tasks.norm.next.launch_early = true; /* the first weights can be on their way while x is still being made */
    if (!reads_x(task)) tasks.product.x = y;
    tasks.product.norm.residual = tasks.product.norm.residual_out = mv_rows{nullptr, 0, 0};
    return tasks;
}

/* The bytes of y. */
static inline size_t plan_workspace(const mv_task *task) {
    if (reads_x(task)) return 0;
    return static_cast<size_t>(task->tokens) * static_cast<size_t>(task->hidden) * mv_dtype_bytes(task->dtype);
}

/* y = x, for products that need it elsewhere, or in two parts (mv_next_launch). */
extern "C" mv_kernel mv_copy_rows_sm80;

/* The first launch: the norm, or in its place a copy. */
static inline mv_status make_y(const mv_task *norm_task, const mv_decision *decision, mv_kernel *norm,
                               mv_error *error) {
    return (norm_task->linear.plain_x ? mv_copy_rows_sm80 : norm)(norm_task, decision, error);
}

/* The second launch is the one that was decided on. */
static inline mv_status norm_then_product(const mv_task *task, const mv_decision *decision, mv_kernel *norm,
                                          mv_error *error) {
    const PlanTasks tasks = plan_tasks(task);
    const mv_status status = reads_x(task) ? MV_OK : make_y(&tasks.norm, decision, norm, error);
    return status == MV_OK ? decision->launch(&tasks.product, decision, error) : status;
}

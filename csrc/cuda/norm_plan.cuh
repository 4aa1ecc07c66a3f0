/* norm_plan.cuh: the plan of two launches, a norm and a product: y goes through the workspace. */
#pragma once

#include <string.h>

#include "../kernel.h"

/* How a row cuts a task: kept when it decides, read by its launch. */
template <typename Cut> void keep_cut(mv_decision *decision, const Cut &cut) {
    static_assert(sizeof(Cut) <= sizeof decision->cut);
    memcpy(decision->cut, &cut, sizeof cut);
}
template <typename Cut> Cut cut_of(const mv_decision *decision) {
    Cut cut;
    memcpy(&cut, decision->cut, sizeof cut);
    return cut;
}

/* Of a row that has a norm in front of its product, and only a rounding behind it. */
static inline const char *norm_linear_why_not(const mv_task *task) {
    if (task->linear.plain_x) return "it multiplies normalised rows only";
    return task->linear.addend.data ? "it adds no residual to its outputs" : nullptr;
}

struct PlanTasks {
    mv_task norm, product;
};

static inline PlanTasks plan_tasks(const mv_task *task) {
    const mv_rows y = {task->workspace, task->inner * task->hidden, task->hidden};
    PlanTasks tasks = {*task, *task};
    tasks.norm.out = y;
    tasks.norm.linear.outputs = 0;
    tasks.norm.next.launch_early = true; /* the first weights can be on their way while x is still being made */
    tasks.product.x = y;
    tasks.product.norm.residual = tasks.product.norm.residual_out = mv_rows{nullptr, 0, 0};
    return tasks;
}

/* The bytes of y. */
static inline size_t plan_workspace(const mv_task *task) {
    return static_cast<size_t>(task->tokens) * static_cast<size_t>(task->hidden) * mv_dtype_bytes(task->dtype);
}

/* The second launch is the one that was decided on. */
static inline mv_status norm_then_product(const mv_task *task, const mv_decision *decision, mv_kernel *norm,
                                          mv_error *error) {
    const PlanTasks tasks = plan_tasks(task);
    const mv_status status = norm(&tasks.norm, decision, error);
    return status == MV_OK ? decision->launch(&tasks.product, decision, error) : status;
}

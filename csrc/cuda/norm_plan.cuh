/* norm_plan.cuh: the plan of two launches, a norm and a product: y goes through the workspace. */
#pragma once

#include "../kernel.h"

struct PlanTasks {
    mv_task norm, product;
};

static inline PlanTasks plan_tasks(const mv_task *task) {
    const mv_rows y = {task->workspace, task->inner * task->hidden, task->hidden};
    PlanTasks tasks = {*task, *task};
    tasks.norm.out = y;
    tasks.norm.outputs = 0;
    tasks.norm.launch_early = true; /* the first weights can be on their way while x is still being made */
    tasks.product.x = y;
    tasks.product.residual = tasks.product.residual_out = mv_rows{nullptr, 0, 0};
    return tasks;
}

static inline mv_status norm_then_product(const mv_task *task, mv_kernel *norm, mv_kernel *product, mv_error *error) {
    const PlanTasks tasks = plan_tasks(task);
    const mv_status status = norm(&tasks.norm, error);
    return status == MV_OK ? product(&tasks.product, error) : status;
}

/* norm_plan.cuh: the plan of two launches, a norm and a product: y goes through the workspace. */
#pragma once

#include "../kernel.h"

static inline mv_status norm_then_product(const mv_task *task, mv_kernel *norm, mv_kernel *product, mv_error *error) {
    const mv_rows y = {task->workspace, task->inner * task->hidden, task->hidden};
    mv_task first = *task;
    first.out = y;
    first.outputs = 0;
    const mv_status status = norm(&first, error);
    if (status != MV_OK) return status;

    mv_task second = *task;
    second.x = y;
    second.residual = second.residual_out = mv_rows{nullptr, 0, 0};
    return product(&second, error);
}

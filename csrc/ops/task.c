/* task.c: see task.h. */
#include "task.h"

#include <math.h>

static int64_t stride_of(const mv_view *view, int dim) { return mv_present(view) ? mv_stride(view, dim) : 0; }

/* One step of `outer` is the whole of `inner`, in every tensor. */
static bool merges(const mv_lead *outer, const mv_lead *inner) {
    return outer->x == inner->x * inner->size && outer->residual == inner->residual * inner->size &&
           outer->out == inner->out * inner->size && outer->residual_out == inner->residual_out * inner->size;
}

static void *advance(void *data, int64_t elements, mv_dtype dtype) {
    return data ? (char *)data + elements * (int64_t)mv_dtype_bytes(dtype) : NULL;
}

void mv_plan_rows(mv_tasks *tasks, const mv_view *x, const mv_view *residual, const mv_view *out,
                  const mv_view *residual_out) {
    mv_task *task = &tasks->task;
    mv_lead *lead = tasks->lead;
    int leads = 0;
    task->tokens = 1;
    for (int d = 0; d < x->ndim - 1; d++) {
        task->tokens *= x->shape[d];
        if (x->shape[d] == 1) continue;
        const mv_lead next = {x->shape[d], stride_of(x, d), stride_of(residual, d), stride_of(out, d),
                              stride_of(residual_out, d)};
        if (leads > 0 && merges(&lead[leads - 1], &next)) {
            const int64_t size = lead[leads - 1].size * next.size;
            lead[leads - 1] = next;
            lead[leads - 1].size = size;
        } else {
            lead[leads++] = next;
        }
    }
    const mv_lead none = {1, 0, 0, 0, 0};
    const mv_lead inner = leads > 0 ? lead[leads - 1] : none;
    const mv_lead outer = leads > 1 ? lead[leads - 2] : none;
    tasks->leads = leads > 2 ? leads - 2 : 0;

    task->device = x->device;
    task->dtype = x->dtype;
    task->hidden = x->shape[x->ndim - 1];
    task->tokens = outer.size * inner.size;
    task->inner = inner.size;
    task->x = (mv_rows){x->data, outer.x, inner.x};
    task->residual = (mv_rows){residual->data, outer.residual, inner.residual};
    task->out = (mv_rows){out->data, outer.out, inner.out};
    task->residual_out = (mv_rows){residual_out->data, outer.residual_out, inner.residual_out};
}

int64_t mv_task_count(const mv_tasks *tasks) {
    int64_t count = 1;
    for (int d = 0; d < tasks->leads; d++) count *= tasks->lead[d].size;
    return count;
}

mv_task mv_task_at(const mv_tasks *tasks, int64_t i) {
    mv_task task = tasks->task;
    for (int d = tasks->leads - 1; d >= 0; d--) {
        const mv_lead *lead = &tasks->lead[d];
        const int64_t at = i % lead->size;
        i /= lead->size;
        task.x.data = advance(task.x.data, at * lead->x, task.dtype);
        task.residual.data = advance(task.residual.data, at * lead->residual, task.dtype);
        task.out.data = advance(task.out.data, at * lead->out, task.dtype);
        task.residual_out.data = advance(task.residual_out.data, at * lead->residual_out, task.dtype);
    }
    return task;
}

mv_status mv_check_numbers(const char *op, double eps, double weight_offset, mv_rounding rounding, mv_error *error) {
    MV_REQUIRE(isfinite(eps) && eps >= 0, MV_BAD_VALUE, "%s: eps is %g, expected a finite number >= 0", op, eps);
    MV_REQUIRE(isfinite(weight_offset), MV_BAD_VALUE, "%s: weight_offset is %g, expected a finite number", op,
               weight_offset);
    MV_REQUIRE(rounding == MV_ROUNDING_HF || rounding == MV_ROUNDING_FP32, MV_BAD_VALUE,
               "%s: unknown rounding, expected \"hf\" or \"fp32\"", op);
    return MV_OK;
}

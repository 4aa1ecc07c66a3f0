/* plan.c: see plan.h. */
#include "plan.h"

#include <string.h>

#include "../cpu/cpu.h"

/* ---- rows ----------------------------------------------------------------------------------------------------- */

/* Of a tensor that is there, or of a C-contiguous one with x's leading dimensions and so many columns. */
static int64_t lead_stride(const mv_view *view, const mv_view *x, int64_t columns, int dim) {
    if (mv_present(view)) return mv_stride(view, dim);
    for (int d = x->ndim - 2; d > dim; d--) columns *= x->shape[d];
    return columns;
}

/* One step of `outer` is the whole of `inner`, in every tensor. */
static bool merges(const mv_lead *outer, const mv_lead *inner) {
    return outer->x == inner->x * inner->size && outer->residual == inner->residual * inner->size &&
           outer->out == inner->out * inner->size && outer->residual_out == inner->residual_out * inner->size;
}

static void *advance(void *data, int64_t elements, mv_dtype dtype) {
    return data ? (char *)data + elements * (int64_t)mv_dtype_bytes(dtype) : NULL;
}

/* Where memory that comes later is taken to be, until it comes: nothing may depend on more than its alignment. */
enum { MEMORY_ALIGNMENT = 16, WORKSPACE_ALIGNMENT = 256 };
static void *data_of(const mv_view *view, bool later) { return later ? (void *)MEMORY_ALIGNMENT : view->data; }

static void take_rows(mv_plan_state *state, const mv_row_views *rows) {
    const mv_view *x = rows->x;
    mv_task *task = &state->part[0].task;
    mv_lead *lead = state->lead;
    int leads = 0;
    task->device = x->device;
    task->dtype = x->dtype;
    task->hidden = x->shape[x->ndim - 1];
    const int64_t sum_columns = mv_present(rows->residual) ? task->hidden : 0;
    for (int d = 0; d < x->ndim - 1; d++) {
        if (x->shape[d] == 1) continue;
        const mv_lead next = {x->shape[d], mv_stride(x, d), lead_stride(rows->residual, x, 0, d),
                              lead_stride(rows->out, x, rows->columns, d),
                              lead_stride(rows->residual_out, x, sum_columns, d)};
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
    state->leads = leads > 2 ? leads - 2 : 0;

    task->tokens = outer.size * inner.size;
    task->inner = inner.size;
    task->x = (mv_rows){x->data, outer.x, inner.x};
    task->norm.residual = (mv_rows){rows->residual->data, outer.residual, inner.residual};
    task->out = (mv_rows){data_of(rows->out, state->out_later), outer.out, inner.out};
    task->norm.residual_out =
        (mv_rows){data_of(rows->residual_out, state->residual_out_later), outer.residual_out, inner.residual_out};
}

static int64_t task_count(const mv_plan_state *state) {
    int64_t count = 1;
    for (int d = 0; d < state->leads; d++) count *= state->lead[d].size;
    return count;
}

/* The part's task for index i of the loop over the leads; *moved is for the rare one that is not the first. */
static const mv_task *task_at(const mv_plan_state *state, const mv_part *part, int64_t i, mv_task *moved) {
    if (i == 0) return &part->task;
    *moved = part->task;
    for (int d = state->leads - 1; d >= 0; d--) {
        const mv_lead *lead = &state->lead[d];
        const int64_t at = i % lead->size;
        i /= lead->size;
        moved->x.data = advance(moved->x.data, at * lead->x, moved->dtype);
        moved->norm.residual.data = advance(moved->norm.residual.data, at * lead->residual, moved->dtype);
        moved->out.data = advance(moved->out.data, at * lead->out, moved->dtype);
        moved->norm.residual_out.data = advance(moved->norm.residual_out.data, at * lead->residual_out, moved->dtype);
    }
    return moved;
}

/* ---- planning ------------------------------------------------------------------------------------------------- */

mv_status mv_start_plan(mv_plan *plan, const mv_list *list, const char *op, const mv_call *call,
                        const mv_row_views *rows, mv_error *error) {
    MV_TRY(mv_check_kernel_name(list, op, call->kernel, error));
    plan->workspace_bytes = 0;
    plan->is_long = false;
    mv_plan_state *state = mv_state(plan);
    state->op = op;
    state->kernel = call->kernel;
    state->list = list;
    state->out_later = !mv_present(rows->out);
    state->residual_out_later = !mv_present(rows->residual_out) && mv_present(rows->residual);
    state->leads = state->parts = 0;
    state->part[0].first_output = 0;
    mv_task *task = &state->part[0].task;
    *task = (mv_task){.stream = call->stream};
    if (mv_is_empty(rows->x)) return MV_OK;
    state->parts = 1;
    take_rows(state, rows);
    MV_TRY(mv_bind_device(op, task, error));
    task->programmatic_launch = task->programmatic_launch && !call->plain_launch;
    return MV_OK;
}

mv_task *mv_add_part(mv_plan *plan, int index, int64_t first_output) {
    mv_plan_state *state = mv_state(plan);
    mv_part *part = &state->part[index];
    *part = state->part[0];
    part->first_output = first_output;
    part->task.out.data = advance(part->task.out.data, first_output, part->task.dtype);
    part->task.norm.residual_out.data = NULL; /* the first part writes it */
    memset(part->task.linear.block, 0, sizeof part->task.linear.block);
    part->task.linear.outputs = 0;
    state->parts = index + 1;
    return &part->task;
}

/* The kernel of one task of the plan: chosen for all tokens of the call, for its bits must not depend on the strides
 * that cut it into tasks; but where a task begins decides its alignment, and with it which kernels fit. */
static mv_status choose(const mv_plan_state *state, int64_t count, const mv_task *task, mv_choice *choice,
                        mv_error *error) {
    return mv_choose(state->list, state->op, task, count * task->tokens, state->kernel, choice, error);
}

mv_status mv_finish_plan(mv_plan *plan, mv_error *error) {
    mv_plan_state *state = mv_state(plan);
    const int64_t count = task_count(state);
    int64_t outputs = 0;
    for (int p = 0; p < state->parts; p++) {
        mv_part *part = &state->part[p];
        outputs += part->task.linear.outputs;
        for (int64_t i = count - 1; i >= 0; i--) {
            mv_task moved;
            const mv_task *task = task_at(state, part, i, &moved);
            MV_TRY(choose(state, count, task, &part->choice, error));
            const size_t bytes = part->choice.decision.workspace;
            if (bytes > plan->workspace_bytes) plan->workspace_bytes = bytes;
        }
    }
    const mv_task *first = &state->part[0].task;
    plan->is_long = state->parts > 0 && first->device.kind == MV_CPU &&
                    mv_is_long_on_cpu(count * first->tokens, first->hidden, outputs);
    return MV_OK;
}

/* ---- running -------------------------------------------------------------------------------------------------- */

static bool is_aligned(const void *data, uintptr_t alignment) { return (uintptr_t)data % alignment == 0; }

static mv_status check_memory(const mv_plan *plan, const mv_plan_state *state, const mv_memory *memory,
                              mv_error *error) {
    MV_REQUIRE(!state->out_later || (memory->out && is_aligned(memory->out, MEMORY_ALIGNMENT)), MV_BAD_VALUE,
               "%s: memory.out is %p, expected the %d-byte aligned memory of the output that the plan was made without",
               state->op, memory->out, MEMORY_ALIGNMENT);
    MV_REQUIRE(!state->residual_out_later || is_aligned(memory->residual_out, MEMORY_ALIGNMENT), MV_BAD_VALUE,
               "%s: memory.residual_out is %p, expected %d-byte aligned memory", state->op, memory->residual_out,
               MEMORY_ALIGNMENT);
    MV_REQUIRE(plan->workspace_bytes == 0 || (memory->workspace && is_aligned(memory->workspace, WORKSPACE_ALIGNMENT)),
               MV_BAD_VALUE, "%s: memory.workspace is %p, expected %zu bytes, %d-byte aligned (plan.workspace_bytes)",
               state->op, memory->workspace, plan->workspace_bytes, WORKSPACE_ALIGNMENT);
    return MV_OK;
}

static void take_memory(mv_plan_state *state, const mv_memory *memory) {
    for (int p = 0; p < state->parts; p++) {
        mv_task *task = &state->part[p].task;
        task->workspace = memory->workspace;
        if (state->out_later) task->out.data = advance(memory->out, state->part[p].first_output, task->dtype);
    }
    if (state->residual_out_later) state->part[0].task.norm.residual_out.data = memory->residual_out;
}

mv_status mv_run(mv_plan *plan, const mv_memory *memory, mv_error *error) {
    mv_plan_state *state = mv_state(plan);
    const mv_memory none = {NULL, NULL, NULL};
    if (!memory) memory = &none;
    if (state->parts == 0) return MV_OK;
    MV_TRY(check_memory(plan, state, memory, error));
    take_memory(state, memory);
    const int64_t count = task_count(state);
    for (int64_t i = 0; i < count; i++) {
        for (int p = 0; p < state->parts; p++) {
            mv_task moved;
            const mv_task *task = task_at(state, &state->part[p], i, &moved);
            mv_choice moved_choice;
            if (i > 0) MV_TRY(choose(state, count, task, &moved_choice, error));
            MV_TRY(mv_run_row(state->op, i > 0 ? &moved_choice : &state->part[p].choice, task, error));
        }
    }
    return MV_OK;
}

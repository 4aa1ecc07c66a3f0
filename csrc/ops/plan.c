/* plan.c: see plan.h. */
#include "plan.h"

#include <string.h>

#include "../cpu/cpu.h"

/* ---- rows ----------------------------------------------------------------------------------------------------- */

/* Dimensions of x's rows: all but that of the columns, and of heads. */
static int lead_dims(const mv_row_view *x) { return x->view->ndim - (x->has_heads ? 2 : 1); }

/* Of a tensor that is there, or of a C-contiguous one with x's leading dimensions and so many columns. */
static int64_t lead_stride(const mv_row_view *row, const mv_row_view *x, int dim) {
    if (mv_present(row->view)) {
        const int along = row->along ? row->along[dim] : dim;
        return along < 0 ? 0 : mv_stride(row->view, along);
    }
    int64_t columns = row->columns;
    for (int d = lead_dims(x) - 1; d > dim; d--) columns *= x->view->shape[d];
    return columns;
}

/* One step of `outer` is the whole of `inner`, in every tensor. */
static bool merges(const mv_plan_state *state, const mv_lead *outer, const mv_lead *inner) {
    for (int r = 0; r < state->rows; r++)
        if (outer->stride[r] != inner->stride[r] * inner->size) return false;
    return true;
}

static mv_rows *rows_at(mv_task *task, const mv_row_place *row) {
    return (mv_rows *)(void *)((char *)task + row->place);
}

static void *advance(void *data, int64_t elements, mv_dtype dtype) {
    return data ? (char *)data + elements * (int64_t)mv_dtype_bytes(dtype) : NULL;
}

/* Where memory that comes later is taken to be, until it comes: nothing may depend on more than its alignment. */
enum { MEMORY_ALIGNMENT = 16, WORKSPACE_ALIGNMENT = 256 };

/* Keeps those that there are, and tells the plan of the outputs. */
static void keep_rows(mv_plan *plan, const mv_row_view *rows, int count, const mv_row_view *kept[MV_MAX_ROW_VIEWS]) {
    mv_plan_state *state = mv_state(plan);
    state->rows = plan->outputs = 0;
    for (int r = 0; r < count; r++) {
        const mv_row_view *row = &rows[r];
        const bool present = mv_present(row->view);
        const mv_dtype of_output = row->is_index ? MV_I64 : rows->view->dtype;
        if (row->output)
            plan->output[plan->outputs++] =
                (mv_output){row->output, rows->view, row->is_index ? 0 : row->columns, of_output};
        if (!present && !row->output) continue;
        kept[state->rows] = row;
        state->row[state->rows++] = (mv_row_place){row->output,  row->place,    present ? row->view->dtype : of_output,
                                                   row->divided, row->optional, !present};
    }
}

static void take_rows(mv_plan_state *state, const mv_row_view *const *rows) {
    const mv_view *x = rows[0]->view;
    mv_task *task = &state->part[0].task;
    mv_lead *lead = state->lead;
    int leads = 0;
    task->device = x->device;
    task->dtype = x->dtype;
    task->hidden = x->shape[x->ndim - 1];
    for (int d = 0; d < lead_dims(rows[0]); d++) {
        if (x->shape[d] == 1) continue;
        mv_lead next = {.size = x->shape[d]};
        for (int r = 0; r < state->rows; r++) next.stride[r] = lead_stride(rows[r], rows[0], d);
        if (leads > 0 && merges(state, &lead[leads - 1], &next)) {
            next.size *= lead[leads - 1].size;
            lead[leads - 1] = next;
        } else {
            lead[leads++] = next;
        }
    }
    static const mv_lead none = {.size = 1};
    const mv_lead *inner = leads > 0 ? &lead[leads - 1] : &none, *outer = leads > 1 ? &lead[leads - 2] : &none;
    state->leads = leads > 2 ? leads - 2 : 0;

    task->tokens = outer->size * inner->size;
    task->inner = inner->size;
    for (int r = 0; r < state->rows; r++) {
        void *data = state->row[r].later ? (void *)MEMORY_ALIGNMENT : rows[r]->view->data;
        *rows_at(task, &state->row[r]) = (mv_rows){data, outer->stride[r], inner->stride[r]};
    }
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
        for (int r = 0; r < state->rows; r++) {
            mv_rows *rows = rows_at(moved, &state->row[r]);
            rows->data = advance(rows->data, at * lead->stride[r], state->row[r].dtype);
        }
    }
    return moved;
}

/* ---- planning ------------------------------------------------------------------------------------------------- */

mv_status mv_start_plan(mv_plan *plan, const mv_list *list, const char *op, const mv_call *call,
                        const mv_row_view *rows, int count, mv_error *error) {
    MV_TRY(mv_check_kernel_name(list, op, call->kernel, error));
    plan->workspace_bytes = 0;
    plan->is_long = false;
    plan->weight_layout = MV_LAYOUT_AUTO;
    mv_plan_state *state = mv_state(plan);
    state->op = op;
    state->kernel = call->kernel;
    state->list = list;
    state->leads = state->parts = 0;
    state->part[0].first_output = 0;
    mv_task *task = &state->part[0].task;
    memset(task, 0, offsetof(mv_task, greedy));
    task->op = op;
    task->stream = call->stream;
    const mv_row_view *kept[MV_MAX_ROW_VIEWS];
    keep_rows(plan, rows, count, kept);
    if (mv_is_empty(rows->view)) return MV_OK;
    state->parts = 1;
    take_rows(state, kept);
    MV_TRY(mv_bind_device(op, task, error));
    task->programmatic_launch = task->programmatic_launch && !call->plain_launch;
    return MV_OK;
}

/* Every part reads the same rows, but has only its own outputs; what else there is to write, the first writes. */
mv_task *mv_add_part(mv_plan *plan, int index, int64_t first_output) {
    mv_plan_state *state = mv_state(plan);
    mv_part *part = &state->part[index];
    *part = state->part[0];
    part->first_output = first_output;
    for (int r = 0; r < state->rows; r++) {
        const mv_row_place *row = &state->row[r];
        mv_rows *rows = rows_at(&part->task, row);
        if (row->divided)
            rows->data = advance(rows->data, first_output, part->task.dtype);
        else if (row->output)
            rows->data = NULL;
    }
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

static mv_status check_output(const mv_plan_state *state, const mv_row_place *row, int i, const void *data,
                              mv_error *error) {
    const bool there = data || row->optional;
    MV_REQUIRE(
        there && is_aligned(data, MEMORY_ALIGNMENT), MV_BAD_VALUE,
        "%s: memory.output[%d] is %p, expected the %d-byte aligned memory of %s, which the plan was made without",
        state->op, i, data, MEMORY_ALIGNMENT, row->output);
    return MV_OK;
}

static mv_status take_memory(const mv_plan *plan, mv_plan_state *state, const mv_memory *memory, mv_error *error) {
    MV_REQUIRE(plan->workspace_bytes == 0 || (memory->workspace && is_aligned(memory->workspace, WORKSPACE_ALIGNMENT)),
               MV_BAD_VALUE, "%s: memory.workspace is %p, expected %zu bytes, %d-byte aligned (plan.workspace_bytes)",
               state->op, memory->workspace, plan->workspace_bytes, WORKSPACE_ALIGNMENT);
    for (int p = 0; p < state->parts; p++) state->part[p].task.workspace = memory->workspace;
    for (int r = 0, i = 0; r < state->rows; r++) {
        const mv_row_place *row = &state->row[r];
        if (!row->output) continue;
        if (row->later) {
            void *data = memory->output[i];
            MV_TRY(check_output(state, row, i, data, error));
            for (int p = 0; p < (row->divided ? state->parts : 1); p++) {
                mv_part *part = &state->part[p];
                rows_at(&part->task, row)->data = advance(data, part->first_output, part->task.dtype);
            }
        }
        i++;
    }
    return MV_OK;
}

mv_status mv_run(mv_plan *plan, const mv_memory *memory, mv_error *error) {
    mv_plan_state *state = mv_state(plan);
    static const mv_memory none = {0};
    if (!memory) memory = &none;
    if (state->parts == 0) return MV_OK;
    MV_TRY(take_memory(plan, state, memory, error));
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

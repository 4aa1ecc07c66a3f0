/* linear_add.c: linear and linear_add: a linear layer without a norm, and one whose outputs are scaled and join a
 * residual. Their kernels are those of rms_norm_qkv. */
#include <math.h>

#include "linear.h"

/* out may be exactly residual: each of its elements is read by who writes it, and before. */
static mv_status check_out(const char *op, const mv_linear_args *a, const mv_linear_views *views, int64_t outputs,
                           mv_error *error) {
    const mv_named out = {op, "out", &a->out};
    MV_TRY((mv_present(&a->out) ? mv_check_output : mv_check_fresh_output)(out, &a->x, outputs, error));
    MV_TRY(mv_check_apart(out, (mv_named){op, "x", &a->x}, false, error));
    MV_TRY(mv_check_apart(out, (mv_named){op, "residual", &a->residual}, true, error));
    return mv_check_apart_from_weights(out, views, error);
}

static mv_status make_plan(const char *op, const mv_list *list, const mv_linear_args *a, mv_plan *plan,
                           mv_error *error) {
    const mv_linear_views views = mv_one_weight(op, &a->x, &a->weight, &a->bias, a->weight_layout);
    mv_layer layer = {0};
    MV_TRY(mv_check_numbers(op, 0, 0, a->rounding, error));
    MV_TRY(mv_check_x((mv_named){op, "x", &a->x}, error));
    MV_TRY(mv_read_one_weight(&views, &layer, error));
    const int64_t outputs = layer.outputs;
    if (mv_present(&a->residual))
        MV_TRY(mv_check_rows((mv_named){op, "residual", &a->residual}, &a->x, outputs, error));
    MV_TRY(check_out(op, a, &views, outputs, error));
    const mv_row_view rows[] = {
        MV_READS(&a->x, a->x.shape[a->x.ndim - 1], x),
        {&a->residual, outputs, offsetof(mv_task, linear.addend), .divided = true},
        {&a->out, outputs, offsetof(mv_task, out), .output = "out", .divided = true},
    };
    MV_TRY(mv_start_plan(plan, list, op, &a->call, rows, 3, error));
    plan->weight_layout = layer.layout;
    mv_task *task = &mv_state(plan)->part[0].task;
    task->rounding = a->rounding;
    task->batch_invariant = a->batch_invariant;
    task->static_weights = a->static_weights;
    task->linear.plain_x = true;
    task->linear.allow_tf32 = a->allow_tf32;
    task->linear.scale = (float)a->scale;
    mv_add_layer(plan, &layer);
    return mv_finish_plan(plan, error);
}

mv_status mv_linear(const mv_linear_args *a, mv_plan *plan, mv_error *error) {
    const char *op = a->call.op ? a->call.op : "linear";
    MV_REQUIRE(!mv_present(&a->residual), MV_BAD_VALUE, "%s: a residual was given; mv_linear_add takes one", op);
    return make_plan(op, &mv_linear_list, a, plan, error);
}

mv_status mv_linear_add(const mv_linear_args *a, mv_plan *plan, mv_error *error) {
    const char *op = a->call.op ? a->call.op : "linear_add";
    MV_REQUIRE(mv_present(&a->residual), MV_BAD_VALUE, "%s: residual is missing", op);
    MV_REQUIRE(isfinite((float)a->scale), MV_BAD_VALUE, "%s: scale is %g, expected a finite number of float32", op,
               a->scale);
    return make_plan(op, &mv_linear_add_list, a, plan, error);
}

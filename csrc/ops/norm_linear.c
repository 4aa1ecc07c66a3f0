/* norm_linear.c: see norm_linear.h. */
#include "norm_linear.h"

mv_status mv_check_norm_inputs(const mv_norm_linear *a, mv_error *error) {
    MV_TRY(mv_check_numbers(a->op, a->eps, a->weight_offset, a->rounding, error));
    MV_TRY(mv_check_x((mv_named){a->op, "x", a->x}, error));
    if (mv_present(a->residual)) MV_TRY(mv_check_like_x((mv_named){a->op, "residual", a->residual}, a->x, error));
    return mv_check_vector((mv_named){a->op, "norm_weight", a->norm_weight}, a->x, a->x->shape[a->x->ndim - 1],
                           "= x.shape[-1]", error);
}

static mv_status check_apart_from_inputs(mv_named out, const mv_norm_linear *a, const mv_linear_views *views,
                                         mv_error *error) {
    MV_TRY(mv_check_apart(out, (mv_named){a->op, "x", a->x}, false, error));
    MV_TRY(mv_check_apart(out, (mv_named){a->op, "residual", a->residual}, false, error));
    MV_TRY(mv_check_apart(out, (mv_named){a->op, "norm_weight", a->norm_weight}, false, error));
    return mv_check_apart_from_weights(out, views, error);
}

static mv_status check_outputs(const mv_norm_linear *a, const mv_linear_views *views, int64_t outputs,
                               mv_error *error) {
    const mv_named out = {a->op, "out", a->out}, residual_out = {a->op, "residual_out", a->residual_out};
    MV_TRY((mv_present(a->out) ? mv_check_output : mv_check_fresh_output)(out, a->x, outputs, error));
    MV_REQUIRE(!mv_present(a->residual_out) || mv_present(a->residual), MV_BAD_VALUE,
               "%s: residual_out was given without a residual", a->op);
    if (mv_present(a->residual_out)) MV_TRY(mv_check_output(residual_out, a->x, a->x->shape[a->x->ndim - 1], error));
    if (mv_present(a->out)) MV_TRY(check_apart_from_inputs(out, a, views, error));
    if (!mv_present(a->residual_out)) return MV_OK;
    MV_TRY(check_apart_from_inputs(residual_out, a, views, error));
    return mv_check_apart(out, residual_out, false, error);
}

mv_status mv_plan_norm_linear(const mv_norm_linear *a, const mv_linear_views *views, const mv_layer *layer,
                              mv_plan *plan, mv_error *error) {
    const int64_t columns = layer->gated ? layer->outputs / 2 : layer->outputs;
    MV_TRY(check_outputs(a, views, columns, error));
    const int64_t hidden = a->x->shape[a->x->ndim - 1];
    const mv_row_view rows[] = {MV_READS(a->x, hidden, x),
                                MV_READS(a->residual, hidden, norm.residual),
                                {a->out, columns, offsetof(mv_task, out), .output = "out", .divided = true},
                                MV_RESIDUAL_OUT(a->residual_out, hidden)};
    MV_TRY(mv_start_plan(plan, a->list, a->op, a->call, rows, mv_present(a->residual) ? 4 : 3, error));
    plan->weight_layout = layer->layout;
    mv_task *task = &mv_state(plan)->part[0].task;
    task->rounding = a->rounding;
    task->batch_invariant = a->batch_invariant;
    task->static_weights = a->static_weights;
    task->norm.weight = a->norm_weight->data;
    task->norm.weight_dtype = a->norm_weight->dtype;
    task->norm.eps = (float)a->eps;
    task->norm.weight_offset = (float)a->weight_offset;
    task->linear.allow_tf32 = a->allow_tf32;
    task->linear.gated = layer->gated;
    task->activation = layer->activation;
    mv_add_layer(plan, layer);
    return mv_finish_plan(plan, error);
}

/* rms_norm_linear.c: RMSNorm and any linear layer. Its kernels are those of rms_norm_qkv, which has three blocks of
 * outputs where this has one. */
#include "norm_linear.h"

mv_status mv_rms_norm_linear(const mv_rms_norm_linear_args *a, mv_plan *plan, mv_error *error) {
    const mv_norm_linear all = MV_NORM_LINEAR(a->call.op ? a->call.op : "rms_norm_linear", a, mv_rms_norm_linear_list);
    const mv_linear_views views = mv_one_weight(all.op, &a->x, &a->weight, &a->bias, a->weight_layout);
    mv_layer layer = {0};
    MV_TRY(mv_check_norm_inputs(&all, error));
    MV_TRY(mv_read_one_weight(&views, &layer, error));
    return mv_plan_norm_linear(&all, &views, &layer, plan, error);
}

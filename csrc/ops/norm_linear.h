/* norm_linear.h: what the ops share that normalise x and go on with a linear layer. */
#ifndef MV_NORM_LINEAR_H
#define MV_NORM_LINEAR_H

#include "linear.h"

/* The arguments that every such op has. */
typedef struct {
    const char *op;
    const mv_call *call;
    const mv_list *list;
    const mv_view *x, *residual, *norm_weight, *out, *residual_out;
    double eps, weight_offset;
    mv_rounding rounding;
    bool batch_invariant, allow_tf32, static_weights;
} mv_norm_linear;

/* Of an op's args struct, whose members have these names. */
#define MV_NORM_LINEAR(name, args, kernels)                                                                            \
    {                                                                                                                  \
        name, &(args)->call, &kernels, &(args)->x, &(args)->residual, &(args)->norm_weight, &(args)->out,              \
            &(args)->residual_out, (args)->eps, (args)->weight_offset, (args)->rounding, (args)->batch_invariant,      \
            (args)->allow_tf32, (args)->static_weights                                                                 \
    }

/* Numbers, x, residual and norm weight. */
mv_status mv_check_norm_inputs(const mv_norm_linear *a, mv_error *error);
/* The outputs, which must overlap nothing; then the plan. */
mv_status mv_plan_norm_linear(const mv_norm_linear *a, const mv_linear_views *views, const mv_layer *layer,
                              mv_plan *plan, mv_error *error);

#endif

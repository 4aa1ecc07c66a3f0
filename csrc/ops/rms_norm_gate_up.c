/* rms_norm_gate_up.c: RMSNorm, the gate and up projections of an MLP, and the activation of the gate times up. Its
 * kernels are those of rms_norm_qkv. */
#include "norm_linear.h"

static const mv_linear_names names = {.weight = "gate_up_weight",
                                      .weights = {"gate_up_weight[0]", "gate_up_weight[1]"},
                                      .bias = "bias",
                                      .biases = {"bias[0]", "bias[1]"},
                                      .outputs = "2 d",
                                      .bias_size = "= the outputs of gate_up_weight",
                                      .most = 2};

/* Two blocks of one size and dtype that lie alike, however the weights were given: a kernel computes their outputs in
 * pairs. */
static mv_status read_gate_up(const mv_linear_views *views, int64_t hidden, mv_layer *layer, mv_error *error) {
    MV_TRY(mv_read_weights(views, hidden, layer, error));
    const char *op = views->op;
    MV_REQUIRE(layer->outputs > 0 && (layer->blocks == 2 || layer->outputs % 2 == 0), MV_BAD_VALUE,
               "%s: gate_up_weight has %lld outputs, expected an even number (gate | up, as many each)", op,
               (long long)layer->outputs);
    const int64_t sizes[] = {layer->outputs / 2, layer->outputs / 2};
    if (layer->blocks == 1) mv_cut_weight(layer, 2, sizes);
    const mv_block *gate = &layer->block[0], *up = &layer->block[1];
    MV_REQUIRE(gate->outputs == up->outputs, MV_BAD_VALUE,
               "%s: gate_up_weight[1] has %lld outputs, expected %lld (= those of gate_up_weight[0])", op,
               (long long)up->outputs, (long long)gate->outputs);
    MV_REQUIRE(layer->weight_dtype[0] == layer->weight_dtype[1], MV_BAD_TYPE,
               "%s: gate_up_weight[1] is %s, expected %s (= the dtype of gate_up_weight[0])", op,
               mv_dtype_name(layer->weight_dtype[1]), mv_dtype_name(layer->weight_dtype[0]));
    MV_REQUIRE((gate->col_stride == 1) == (up->col_stride == 1), MV_BAD_VALUE,
               "%s: one of gate_up_weight is contiguous along hidden and the other is not; copy one of them so that "
               "both lie alike",
               op);
    return mv_read_biases(views, layer, error);
}

mv_status mv_rms_norm_gate_up(const mv_rms_norm_gate_up_args *a, mv_plan *plan, mv_error *error) {
    const mv_norm_linear all =
        MV_NORM_LINEAR(a->call.op ? a->call.op : "rms_norm_gate_up", a, mv_rms_norm_gate_up_list);
    const mv_linear_views views = {all.op, &names, &a->x, a->gate_up_weight, a->bias, a->weight_layout};
    mv_layer layer = {.gated = true, .activation = a->activation};
    MV_REQUIRE(a->activation == MV_SILU || a->activation == MV_GELU_TANH || a->activation == MV_GELU, MV_BAD_VALUE,
               "%s: unknown activation, expected \"silu\", \"gelu_tanh\" or \"gelu\"", all.op);
    MV_TRY(mv_check_norm_inputs(&all, error));
    MV_TRY(read_gate_up(&views, a->x.shape[a->x.ndim - 1], &layer, error));
    return mv_plan_norm_linear(&all, &views, &layer, plan, error);
}

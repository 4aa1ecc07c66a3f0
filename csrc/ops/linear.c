/* linear.c: see linear.h. */
#include "linear.h"

/* Of a tuple, so many members; else 1, be there a tensor or none. */
static int count_members(const mv_view *views, int most) {
    for (int i = 1; i < most; i++)
        if (mv_present(&views[i])) return most;
    return 1;
}

static mv_named weight_at(const mv_linear_views *v, int members, int i) {
    return (mv_named){v->op, members > 1 ? v->names->weights[i] : v->names->weight, &v->weight[i]};
}
static mv_named bias_at(const mv_linear_views *v, int members, int i) {
    return (mv_named){v->op, members > 1 ? v->names->biases[i] : v->names->bias, &v->bias[i]};
}

/* What a matrix's shape alone says: AUTO where it is square and fits both ways. */
static mv_status layout_by_shape(const mv_linear_views *v, int members, int i, int64_t hidden, mv_weight_layout *layout,
                                 mv_error *error) {
    const mv_view *w = &v->weight[i];
    const bool out_in = w->shape[1] == hidden, in_out = w->shape[0] == hidden;
    MV_REQUIRE(out_in || in_out, MV_BAD_VALUE,
               "%s: %s has shape %s, expected [%s, %lld] (as nn.Linear keeps it) or its transpose (x.shape[-1] is "
               "%lld)",
               v->op, weight_at(v, members, i).name, mv_shape_text(w).text, v->names->outputs, (long long)hidden,
               (long long)hidden);
    *layout = out_in && in_out ? MV_LAYOUT_AUTO : out_in ? MV_LAYOUT_OUT_IN : MV_LAYOUT_IN_OUT;
    return MV_OK;
}

/* The layout of all members: as told, else as any non-square member says. Strides do not tell: a square matrix whose
 * columns are contiguous may be a .t() view, or a Linear's weight that came out of Fortran order. */
static mv_status common_layout(const mv_linear_views *v, int members, int64_t hidden, mv_weight_layout *common,
                               mv_error *error) {
    *common = v->layout;
    for (int i = 0; i < members; i++) {
        mv_weight_layout layout = MV_LAYOUT_AUTO;
        MV_TRY(layout_by_shape(v, members, i, hidden, &layout, error));
        if (layout == MV_LAYOUT_AUTO) continue;
        MV_REQUIRE(*common == MV_LAYOUT_AUTO || *common == layout, MV_BAD_VALUE,
                   "%s: %s has shape %s, which does not fit the layout that %s (x.shape[-1] is %lld)", v->op,
                   weight_at(v, members, i).name, mv_shape_text(&v->weight[i]).text,
                   v->layout == MV_LAYOUT_AUTO ? "the other weights have" : "weight_layout names", (long long)hidden);
        *common = layout;
    }
    MV_REQUIRE(*common != MV_LAYOUT_AUTO, MV_BAD_VALUE,
               "%s: %s %s square (%s), so it could be [%s, hidden] or [hidden, %s]; pass "
               "weight_layout=\"out_in\" for a Linear's .weight, \"in_out\" for its .t()",
               v->op, v->names->weight, members > 1 ? "has only members that are" : "is",
               mv_shape_text(&v->weight[0]).text, v->names->outputs, v->names->outputs);
    return MV_OK;
}

static const char *bytes_at(const void *data, int64_t elements, mv_dtype dtype) {
    return (const char *)data + elements * (int64_t)mv_dtype_bytes(dtype);
}

mv_status mv_read_weights(const mv_linear_views *v, int64_t hidden, mv_layer *layer, mv_error *error) {
    layer->blocks = count_members(v->weight, v->names->most);
    for (int i = 0; i < layer->blocks; i++) {
        const mv_named w = weight_at(v, layer->blocks, i);
        MV_REQUIRE(mv_present(w.view), MV_BAD_VALUE, "%s: %s is missing", w.op, w.name);
        MV_TRY(mv_check_parameter(w, v->x, error));
        MV_REQUIRE(w.view->ndim == 2, MV_BAD_VALUE, "%s: %s has shape %s, expected a matrix", w.op, w.name,
                   mv_shape_text(w.view).text);
    }
    MV_TRY(common_layout(v, layer->blocks, hidden, &layer->layout, error));
    const int out_dim = layer->layout == MV_LAYOUT_OUT_IN ? 0 : 1;
    const mv_block *whole = &layer->block[0];
    layer->outputs = 0;
    layer->packed = true;
    for (int i = 0; i < layer->blocks; i++) {
        const mv_view *w = &v->weight[i];
        mv_block *block = &layer->block[i];
        *block = (mv_block){.weight = w->data,
                            .outputs = w->shape[out_dim],
                            .row_stride = mv_stride(w, out_dim),
                            .col_stride = hidden == 1 ? 1 : mv_stride(w, 1 - out_dim)};
        layer->weight_dtype[i] = w->dtype;
        layer->packed = layer->packed && w->dtype == layer->weight_dtype[0] && block->row_stride == whole->row_stride &&
                        block->col_stride == whole->col_stride &&
                        block->weight == bytes_at(whole->weight, layer->outputs * whole->row_stride, w->dtype);
        layer->outputs += block->outputs;
    }
    return MV_OK;
}

void mv_cut_weight(mv_layer *layer, int blocks, const int64_t *outputs) {
    const mv_block whole = layer->block[0];
    int64_t first = 0;
    for (int i = 0; i < blocks; i++) {
        layer->block[i] = whole;
        layer->block[i].weight = bytes_at(whole.weight, first * whole.row_stride, layer->weight_dtype[0]);
        layer->block[i].outputs = outputs[i];
        layer->weight_dtype[i] = layer->weight_dtype[0];
        first += outputs[i];
    }
    layer->blocks = blocks;
}

mv_status mv_read_biases(const mv_linear_views *v, mv_layer *layer, mv_error *error) {
    const int members = count_members(v->bias, v->names->most);
    const bool tuple = members > 1;
    if (!tuple && !mv_present(&v->bias[0])) return MV_OK;
    if (!tuple) MV_TRY(mv_check_vector(bias_at(v, 1, 0), v->x, layer->outputs, v->names->bias_size, error));
    const mv_block *whole = &layer->block[0];
    int64_t first = 0;
    for (int i = 0; i < layer->blocks; i++) {
        mv_block *block = &layer->block[i];
        const mv_named bias = bias_at(v, members, tuple ? i : 0);
        if (tuple) {
            MV_REQUIRE(mv_present(bias.view), MV_BAD_VALUE, "%s: %s is missing", bias.op, bias.name);
            MV_TRY(mv_check_vector(bias, v->x, block->outputs, "= the outputs of its weight", error));
        }
        block->bias = tuple ? bias.view->data : bytes_at(bias.view->data, first, bias.view->dtype);
        block->bias_dtype = bias.view->dtype;
        layer->packed = layer->packed && block->bias_dtype == whole->bias_dtype &&
                        block->bias == bytes_at(whole->bias, first, block->bias_dtype);
        first += block->outputs;
    }
    return MV_OK;
}

mv_linear_views mv_one_weight(const char *op, const mv_view *x, const mv_view *weight, const mv_view *bias,
                              mv_weight_layout layout) {
    static const mv_linear_names names = {
        .weight = "weight", .bias = "bias", .outputs = "outputs", .bias_size = "= the outputs of weight", .most = 1};
    return (mv_linear_views){op, &names, x, weight, bias, layout};
}

mv_status mv_read_one_weight(const mv_linear_views *v, mv_layer *layer, mv_error *error) {
    MV_TRY(mv_read_weights(v, v->x->shape[v->x->ndim - 1], layer, error));
    MV_REQUIRE(layer->outputs > 0, MV_BAD_VALUE, "%s: weight has no outputs, expected at least one", v->op);
    return mv_read_biases(v, layer, error);
}

mv_status mv_check_apart_from_weights(mv_named out, const mv_linear_views *v, mv_error *error) {
    const int weights = count_members(v->weight, v->names->most), biases = count_members(v->bias, v->names->most);
    for (int i = 0; i < v->names->most; i++) {
        if (i < weights) MV_TRY(mv_check_apart(out, weight_at(v, weights, i), false, error));
        if (i < biases) MV_TRY(mv_check_apart(out, bias_at(v, biases, i), false, error));
    }
    return MV_OK;
}

/* Can one task compute both blocks? */
static bool are_alike(const mv_layer *layer, int i, int j) {
    return layer->weight_dtype[i] == layer->weight_dtype[j] &&
           (layer->block[i].col_stride == 1) == (layer->block[j].col_stride == 1);
}

void mv_add_layer(mv_plan *plan, const mv_layer *layer) {
    if (mv_state(plan)->parts == 0) return; /* there are no tokens */
    mv_linear_layer *linear = &mv_state(plan)->part[0].task.linear;
    int64_t first_output = 0;
    for (int i = 0, part = 0, blocks = 0; i < layer->blocks; i++) {
        const mv_block *block = &layer->block[i];
        if (i > 0 && !layer->packed && !are_alike(layer, i - 1, i)) {
            linear = &mv_add_part(plan, ++part, first_output)->linear;
            blocks = 0;
        }
        linear->block[blocks++] = *block;
        linear->outputs += block->outputs;
        linear->weight_dtype = layer->weight_dtype[i];
        linear->packed = !layer->gated && (layer->packed || blocks == 1);
        first_output += block->outputs;
    }
}

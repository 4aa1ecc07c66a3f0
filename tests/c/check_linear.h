/* check_linear.h: the ops with a linear layer, of test_kernels.c. */
#ifndef TESTS_CHECK_LINEAR_H
#define TESTS_CHECK_LINEAR_H

#include "check_norms.h"

typedef enum { ROWS, COLUMNS, GAPS } Order; /* of a weight: contiguous along hidden, along the outputs, along neither */

typedef struct {
    int64_t tokens, hidden, outputs;
    Order order;
    bool wide, biased, several, adds; /* float32 weights and biases; several matrices; a residual */
    mv_activation activation;
    mv_rounding rounding;
} LinearCase;

typedef struct {
    Tensor *x, *residual, *norm_weight, *weight[3], *bias[3], *out;
    mv_view weight_view[3];
    int blocks;
    int64_t rows[3]; /* outputs of each */
} Layer;

/* W[n][k] of a matrix is element n * row + k * column. */
static void strides_of(const LinearCase *c, int64_t outputs, int64_t *row, int64_t *column) {
    *row = c->order == ROWS ? c->hidden : c->order == COLUMNS ? 1 : 2;
    *column = c->order == ROWS ? 1 : c->order == COLUMNS ? outputs : 2 * outputs;
}

static Layer new_layer(const mv_kernel_info *kernel, const LinearCase *c, bool norm, int blocks, const int64_t *rows,
                       int64_t out_columns) {
    const mv_dtype dtype = kernel->dtype, weight_dtype = c->wide ? MV_F32 : dtype;
    Layer layer = {.blocks = c->several ? blocks : 1, .rows = {c->outputs}};
    layer.x = filled(NEW(dtype, c->tokens, c->hidden), 0, 1);
    layer.out = NEW(dtype, c->tokens, out_columns);
    if (norm) layer.norm_weight = filled(NEW(dtype, c->hidden), 1, 0.2);
    if (c->adds) layer.residual = filled(NEW(dtype, c->tokens, norm ? c->hidden : out_columns), 0, 1);
    for (int b = 0; b < layer.blocks; b++) {
        if (c->several) layer.rows[b] = rows[b];
        const int64_t n = layer.rows[b], two = c->order == GAPS ? 2 : 1;
        layer.weight[b] = c->order == ROWS ? NEW(weight_dtype, n, c->hidden) : NEW(weight_dtype, c->hidden, n * two);
        filled(layer.weight[b], 0, 1 / sqrt((double)c->hidden));
        layer.weight_view[b] = layer.weight[b]->view;
        layer.weight[b]->shape[0] = n; /* whatever the strides, [outputs, hidden] */
        layer.weight[b]->shape[1] = c->hidden;
        strides_of(c, n, &layer.weight[b]->strides[0], &layer.weight[b]->strides[1]);
        if (c->biased) layer.bias[b] = filled(NEW(weight_dtype, n), 0, 0.5);
    }
    return layer;
}

/* A sum of the layer, and what it may be off by: by the roundings of its terms, which are as often up as down, and by
 * those of float32 sums. */
typedef struct {
    double sum, error;
} Sum;

static Sum output_of(const mv_kernel_info *kernel, const LinearCase *c, const Layer *layer, const double *y,
                     int64_t n) {
    int b = 0;
    int64_t row, column;
    for (; n >= layer->rows[b]; b++) n -= layer->rows[b];
    strides_of(c, layer->rows[b], &row, &column);
    double sum = layer->bias[b] ? value_at(layer->bias[b], n) : 0, squares = 0, magnitude = fabs(sum);
    for (int64_t k = 0; k < c->hidden; k++) {
        const double term = y[k] * value_at(layer->weight[b], n * row + k * column);
        sum += term;
        squares += term * term;
        magnitude += fabs(term);
    }
    return (Sum){sum, 4 * unit(kernel->dtype) * sqrt(squares) + 4 * unit(MV_F32) * magnitude};
}

/* Of a gated layer column n of out joins the sums n and columns + n; else a column is a sum, times scale, and with the
 * residual where there is no norm before. */
static void compare_layer(const mv_kernel_info *kernel, const LinearCase *c, const Layer *layer, bool gated,
                          double scale) {
    const mv_dtype dtype = kernel->dtype;
    const bool hf = c->rounding == MV_ROUNDING_HF, norm = layer->norm_weight != NULL;
    const int64_t columns = layer->out->shape[1];
    double *s = malloc(2 * (size_t)c->hidden * sizeof *s), *y = s + c->hidden;
    if (!s) exit(1);
    for (int64_t t = 0; t < c->tokens; t++) {
        norm_row(layer->x, norm ? layer->residual : NULL, layer->norm_weight, t, 0, c->rounding, s, y);
        for (int64_t i = 0; !norm && i < c->hidden; i++) y[i] = value_at(layer->x, t * c->hidden + i);
        for (int64_t n = 0; n < columns; n++) {
            const Sum first = output_of(kernel, c, layer, y, n);
            double exact = first.sum * scale, bound = first.error * fabs(scale);
            bound += hf ? 2 * rounding_of(dtype, exact) : 0;
            if (gated) {
                const Sum up = output_of(kernel, c, layer, y, columns + n);
                const double gate_error = 1.2 * (first.error + hf * rounding_of(dtype, first.sum));
                const double up_error = up.error + hf * rounding_of(dtype, up.sum);
                const double active = activation_of(c->activation, first.sum);
                exact = active * up.sum;
                bound = gate_error * (fabs(up.sum) + up_error) + fabs(active) * up_error;
                bound += (fabs(up.sum) + up_error) * rounding_of(dtype, fabs(active) + gate_error);
            } else if (!norm && layer->residual) {
                exact += value_at(layer->residual, t * columns + n);
            }
            near(kernel, value_at(layer->out, t * columns + n), exact, bound + rounding_of(dtype, fabs(exact) + bound),
                 "out");
        }
    }
    free(s);
}

/* The cases of an op, of `parts` outputs or a multiple of them. */
static int next_case(LinearCase *c, int number, int parts) {
    static const int64_t hidden[] = {1, 3, 7, 16, 33, 67, 130, 261, 600}, tokens[] = {1, 2, 3, 5, 9, 17, 35};
    enum { CASES = 36 };
    *c = (LinearCase){.tokens = tokens[number % 7],
                      .hidden = hidden[number % 9],
                      .outputs = parts * (1 + number * 5 % 23),
                      .order = (Order)(number / 3 % 3),
                      .wide = number % 4 == 1,
                      .biased = number % 5 < 3,
                      .several = number % 8 > 4,
                      .adds = number % 3 == 0,
                      .activation = (mv_activation)(number % 3),
                      .rounding = number % 2 ? MV_ROUNDING_FP32 : MV_ROUNDING_HF};
    if (number == CASES - 1) *c = (LinearCase){.tokens = 131, .hidden = 261, .outputs = parts * (60 / parts + 1)};
    if (number == CASES - 2) *c = (LinearCase){.tokens = 2, .hidden = 16384 * 2 + 37, .outputs = parts * 3};
    return number < CASES;
}

#define LAYER_ARGS(c, layer)                                                                                           \
    .call.kernel = kernel->name, .x = layer.x->view, .residual = view_of(layer.residual), .out = layer.out->view,      \
    .rounding = c.rounding, .weight_layout = MV_LAYOUT_OUT_IN
#define WITH_NORM(layer) .norm_weight = layer.norm_weight->view, .eps = eps

static void check_rms_norm_qkv(const mv_kernel_info *kernel) {
    LinearCase c;
    mv_plan plan;
    for (int i = 0; next_case(&c, i, 5); i++) {
        const int64_t d = c.outputs / 5, rows[] = {3 * d, d, d};
        const Layer layer = new_layer(kernel, &c, true, 3, rows, c.outputs);
        mv_rms_norm_qkv_args args = {LAYER_ARGS(c, layer), WITH_NORM(layer), .num_heads = 3, .num_kv_heads = 1};
        for (int b = 0; b < layer.blocks; b++)
            args.qkv_weight[b] = layer.weight_view[b], args.bias[b] = view_of(layer.bias[b]);
        if (run(kernel, mv_rms_norm_qkv(&args, &plan, &error), &plan)) compare_layer(kernel, &c, &layer, false, 1);
        free_tensors();
    }
}

static void check_rms_norm_gate_up(const mv_kernel_info *kernel) {
    LinearCase c;
    mv_plan plan;
    for (int i = 0; next_case(&c, i, 2); i++) {
        const int64_t d = c.outputs / 2, rows[] = {d, d};
        const Layer layer = new_layer(kernel, &c, true, 2, rows, d);
        mv_rms_norm_gate_up_args args = {LAYER_ARGS(c, layer), WITH_NORM(layer), .activation = c.activation};
        for (int b = 0; b < layer.blocks; b++)
            args.gate_up_weight[b] = layer.weight_view[b], args.bias[b] = view_of(layer.bias[b]);
        if (run(kernel, mv_rms_norm_gate_up(&args, &plan, &error), &plan)) compare_layer(kernel, &c, &layer, true, 1);
        free_tensors();
    }
}

static void check_rms_norm_linear(const mv_kernel_info *kernel) {
    LinearCase c;
    mv_plan plan;
    for (int i = 0; next_case(&c, i, 1); i++) {
        const Layer layer = new_layer(kernel, &c, true, 1, &c.outputs, c.outputs);
        const mv_rms_norm_linear_args args = {LAYER_ARGS(c, layer), WITH_NORM(layer), .weight = layer.weight_view[0],
                                              .bias = view_of(layer.bias[0])};
        if (run(kernel, mv_rms_norm_linear(&args, &plan, &error), &plan)) compare_layer(kernel, &c, &layer, false, 1);
        free_tensors();
    }
}

static void check_products(const mv_kernel_info *kernel, bool adds) {
    LinearCase c;
    mv_plan plan;
    for (int i = 0; next_case(&c, i, 1); i++) {
        const double scale = adds && i % 2 ? 0.25 : 1;
        c.adds = adds;
        const Layer layer = new_layer(kernel, &c, false, 1, &c.outputs, c.outputs);
        const mv_linear_args args = {LAYER_ARGS(c, layer), .weight = layer.weight_view[0],
                                     .bias = view_of(layer.bias[0]), .scale = scale};
        if (run(kernel, (adds ? mv_linear_add : mv_linear)(&args, &plan, &error), &plan))
            compare_layer(kernel, &c, &layer, false, scale);
        free_tensors();
    }
}
static void check_linear(const mv_kernel_info *kernel) { check_products(kernel, false); }
static void check_linear_add(const mv_kernel_info *kernel) { check_products(kernel, true); }

#endif

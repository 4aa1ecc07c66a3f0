/* check_norms.h: the norm ops, and silu_and_mul and gelu_and_mul, of test_kernels.c. */
#ifndef TESTS_CHECK_NORMS_H
#define TESTS_CHECK_NORMS_H

#include "kernels.h"

static const double eps = 1e-6;

/* A row of s = x, or rn(x + residual), and of y, its norm; in float64 but for the roundings of the contract. */
static void norm_row(const Tensor *x, const Tensor *residual, const Tensor *weight, int64_t row, double offset,
                     mv_rounding rounding, double *s, double *y) {
    const int64_t hidden = x->shape[1], at = row * hidden;
    double squares = 0;
    for (int64_t i = 0; i < hidden; i++) {
        s[i] = value_at(x, at + i);
        if (residual) s[i] = round_to((float)s[i] + (float)value_at(residual, at + i), x->dtype);
        squares += s[i] * s[i];
    }
    const double r = 1 / sqrt(squares / (double)hidden + eps);
    for (int64_t i = 0; i < hidden; i++) {
        const double w = offset + (weight ? value_at(weight, i) : 1);
        y[i] = rounding == MV_ROUNDING_HF ? round_to(round_to(s[i] * r, x->dtype) * w, x->dtype) : s[i] * r * w;
    }
}

typedef struct {
    int64_t tokens, hidden;
    bool adds_before, adds_after, own_weight;
    mv_rounding rounding;
} NormCase;

static void check_norm(const mv_kernel_info *kernel, mv_status (*op)(const mv_rms_norm_args *, mv_plan *, mv_error *),
                       NormCase c) {
    const mv_dtype dtype = kernel->dtype;
    const double offset = c.own_weight ? 0 : 1;
    Tensor *x = filled(NEW(dtype, c.tokens, c.hidden), 0, 1), *out = NEW(dtype, c.tokens, c.hidden);
    Tensor *weight = filled(NEW(c.own_weight ? dtype : MV_F32, c.hidden), 1 - offset, 0.2);
    Tensor *residual = c.adds_before || c.adds_after ? filled(NEW(dtype, c.tokens, c.hidden), 0, 1) : NULL;
    Tensor *total = c.adds_before ? NEW(dtype, c.tokens, c.hidden) : NULL;
    const mv_rms_norm_args args = {.call.kernel = kernel->name,
                                   .x = x->view,
                                   .residual = view_of(residual),
                                   .weight = weight->view,
                                   .out = out->view,
                                   .residual_out = view_of(total),
                                   .eps = eps,
                                   .weight_offset = offset,
                                   .rounding = c.rounding};
    mv_plan plan;
    double *s = malloc(2 * (size_t)c.hidden * sizeof *s), *y = s + c.hidden;
    if (!s) exit(1);
    if (run(kernel, op(&args, &plan, &error), &plan))
        for (int64_t row = 0; row < c.tokens; row++) {
            norm_row(x, c.adds_before ? residual : NULL, weight, row, offset, c.rounding, s, y);
            for (int64_t i = 0; i < c.hidden; i++) {
                const int64_t at = row * c.hidden + i;
                const double exact = y[i] + (c.adds_after ? value_at(residual, at) : 0);
                const double bound = 3 * rounding_of(dtype, y[i]) + rounding_of(dtype, exact);
                near(kernel, value_at(out, at), exact, bound + 4 * unit(MV_F32) * fabs(y[i]), "out");
                if (total) same(kernel, value_at(total, at), s[i], "residual_out");
            }
        }
    free(s);
    free_tensors();
}

static void check_norms(const mv_kernel_info *kernel, bool adds_before, bool adds_after,
                        mv_status (*op)(const mv_rms_norm_args *, mv_plan *, mv_error *)) {
    static const int64_t long_rows[] = {67, 128, 1001, 16384 + 33};
    for (int64_t i = 1; i <= 37; i++)
        for (int rounding = 0; rounding < 2; rounding++) {
            const int64_t hidden = i <= 33 ? i : long_rows[i - 34];
            const NormCase c = {.tokens = i % 3 + 1,
                                .hidden = hidden,
                                .adds_before = adds_before,
                                .adds_after = adds_after,
                                .own_weight = i % 2 == 0,
                                .rounding = rounding ? MV_ROUNDING_FP32 : MV_ROUNDING_HF};
            check_norm(kernel, op, c);
        }
}

/* Sums of all numbers of 16 bits with some: how a vector is rounded where it is halfway, subnormal, too large or no
 * number at all. */
static void check_sums(const mv_kernel_info *kernel) {
    enum { ALL = 65536 };
    const mv_dtype dtype = kernel->dtype;
    const double half = unit(dtype), tiny = dtype == MV_F16 ? ldexp(1, -24) : ldexp(1, -133);
    const double addends[] = {
        0,   -0.0, half,  -half,    3 * half,  half * (1 + 2 * half), 1,          -1 - half,  tiny, -3 * tiny, 65504,
        -32, 3e38, -3e38, INFINITY, -INFINITY, (double)NAN,           512 * tiny, 257 * half, 16};
    enum { ADDENDS = sizeof addends / sizeof addends[0] };
    if (dtype == MV_F32) return;
    Tensor *x = NEW(dtype, ADDENDS, ALL), *residual = NEW(dtype, ADDENDS, ALL);
    Tensor *out = NEW(dtype, ADDENDS, ALL), *total = NEW(dtype, ADDENDS, ALL);
    for (int64_t i = 0; i < x->count; i++) {
        ((uint16_t *)x->data)[i] = (uint16_t)i;
        set(residual->data, dtype, i, addends[i / ALL]);
    }
    const mv_rms_norm_args args = {.call.kernel = kernel->name,
                                   .x = x->view,
                                   .residual = residual->view,
                                   .out = out->view,
                                   .residual_out = total->view,
                                   .eps = eps};
    mv_plan plan;
    if (run(kernel, mv_add_rms_norm(&args, &plan, &error), &plan))
        for (int64_t i = 0; i < x->count; i++) {
            const float sum = (float)value_at(x, i) + (float)value_at(residual, i);
            same(kernel, value_at(total, i), round_to((double)sum, dtype), "a rounded sum");
        }
    free_tensors();
}

static void check_rms_norm(const mv_kernel_info *kernel) { check_norms(kernel, false, false, mv_rms_norm); }
static void check_norm_add(const mv_kernel_info *kernel) { check_norms(kernel, false, true, mv_norm_add); }
static void check_add_rms_norm(const mv_kernel_info *kernel) {
    check_norms(kernel, true, false, mv_add_rms_norm);
    check_sums(kernel);
}

/* ---- activations ---------------------------------------------------------------------------------------------- */

static void check_activation(const mv_kernel_info *kernel, mv_activation activation,
                             mv_status (*op)(const mv_act_and_mul_args *, mv_plan *, mv_error *)) {
    for (int64_t d = 1; d <= 67; d += d < 20 ? 1 : 13)
        for (int rounding = 0; rounding < 2; rounding++) {
            Tensor *x = filled(NEW(kernel->dtype, 3, 2 * d), 0, 3), *out = NEW(kernel->dtype, 3, d);
            const mv_act_and_mul_args args = {.call.kernel = kernel->name,
                                              .x = x->view,
                                              .out = out->view,
                                              .approximate =
                                                  activation == MV_GELU ? MV_APPROXIMATE_NONE : MV_APPROXIMATE_TANH,
                                              .rounding = rounding ? MV_ROUNDING_FP32 : MV_ROUNDING_HF};
            mv_plan plan;
            if (run(kernel, op(&args, &plan, &error), &plan))
                for (int64_t i = 0; i < 3 * d; i++) {
                    const double gate = value_at(x, i / d * 2 * d + i % d), up = value_at(x, i / d * 2 * d + d + i % d);
                    compared++;
                    if (!act_and_mul_is_right(activation, args.rounding, kernel->dtype, gate, up, value_at(out, i)))
                        fail(kernel, "a gate and up (test_act_and_mul.c has more)");
                }
            free_tensors();
        }
}

static void check_silu_and_mul(const mv_kernel_info *kernel) { check_activation(kernel, MV_SILU, mv_silu_and_mul); }
static void check_gelu_and_mul(const mv_kernel_info *kernel) {
    check_activation(kernel, MV_GELU, mv_gelu_and_mul);
    check_activation(kernel, MV_GELU_TANH, mv_gelu_and_mul);
}

#endif

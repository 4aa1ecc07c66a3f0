/* check_heads.h: decode_attention and qk_norm_rope, of test_kernels.c. */
#ifndef TESTS_CHECK_HEADS_H
#define TESTS_CHECK_HEADS_H

#include "kernels.h"

static const double head_eps = 1e-5;

/* What the heads of a call go through. Absent: no norm, no rotary embedding. */
typedef struct {
    const Tensor *weight, *cosines, *sines;
    bool interleaved;
    mv_rounding rounding;
} Embedding;

/* Head `at` of a tensor of heads, after norm and rotary embedding by the row `angle`. */
static void prepare(const Embedding *e, const Tensor *heads, int64_t at, int64_t dim, int64_t angle, double *y) {
    const mv_dtype dtype = heads->dtype;
    const bool hf = e->rounding == MV_ROUNDING_HF;
    double squares = 0, before[256];
    for (int64_t i = 0; i < dim; i++) {
        y[i] = value_at(heads, at * dim + i);
        squares += y[i] * y[i];
    }
    for (int64_t i = 0; e->weight && i < dim; i++) {
        y[i] /= sqrt(squares / (double)dim + head_eps);
        if (hf) y[i] = round_to(y[i], dtype);
        y[i] *= value_at(e->weight, i);
        if (hf) y[i] = round_to(y[i], dtype);
    }
    if (!e->cosines) return;
    const int64_t columns = e->cosines->shape[1], half = columns / 2;
    memcpy(before, y, (size_t)dim * sizeof *y);
    for (int64_t i = 0; i < columns; i++) {
        const bool first = e->interleaved ? i % 2 == 0 : i < half;
        const int64_t other = e->interleaved ? i ^ 1 : first ? i + half : i - half;
        double a = before[i] * value_at(e->cosines, angle * columns + i);
        double b = (first ? -before[other] : before[other]) * value_at(e->sines, angle * columns + i);
        if (hf && e->cosines->dtype == dtype) a = round_to(a, dtype), b = round_to(b, dtype);
        y[i] = hf ? round_to(a + b, dtype) : a + b;
    }
}

/* May be off by the last rounding, and by those of two products. */
static double prepared_bound(mv_dtype dtype, double value, double size) {
    return 2 * rounding_of(dtype, value) + (unit(dtype) + 8 * unit(MV_F32)) * 2 * size;
}

static double largest_of(const double *y, int64_t count) {
    double most = 0;
    for (int64_t i = 0; i < count; i++) most = fmax(most, fabs(y[i]));
    return most;
}

typedef struct {
    int64_t dim, columns; /* of a head, and of them those that turn */
    bool norm, wide, interleaved;
    mv_rounding rounding;
} HeadCase;

static int next_head(HeadCase *c, int number) {
    static const int64_t dims[] = {2, 5, 16, 131, 20, 64, 67, 80, 128, 33};
    enum { CASES = 20 };
    const int64_t dim = dims[number % 10];
    *c = (HeadCase){.dim = dim,
                    .columns = number % 4 == 3 ? 0
                               : number % 3    ? dim / 2 * 2
                                               : (dim / 4 + 1) * 2,
                    .norm = number % 5 > 0,
                    .wide = number % 6 > 2,
                    .interleaved = number % 7 > 3,
                    .rounding = number / 10 ? MV_ROUNDING_FP32 : MV_ROUNDING_HF};
    return number < CASES;
}

/* For `rows` tokens or sequences. */
static Embedding new_embedding(const mv_kernel_info *kernel, const HeadCase *c, int64_t rows) {
    const mv_dtype dtype = c->wide ? MV_F32 : kernel->dtype;
    Embedding e = {.interleaved = c->interleaved, .rounding = c->rounding};
    if (c->norm) e.weight = filled(NEW(dtype, c->dim), 1, 0.2);
    if (!c->columns) return e;
    e.cosines = filled(NEW(dtype, rows, c->columns), 0, 0.7);
    e.sines = filled(NEW(dtype, rows, c->columns), 0, 0.7);
    return e;
}

/* ---- qk_norm_rope --------------------------------------------------------------------------------------------- */

static void compare_head(const mv_kernel_info *kernel, const Tensor *got, int64_t at, const double *exact, int64_t dim,
                         const char *what) {
    const double size = largest_of(exact, dim);
    for (int64_t i = 0; i < dim; i++)
        near(kernel, value_at(got, at * dim + i), exact[i], prepared_bound(got->dtype, exact[i], size), what);
}

static void check_qk_norm_rope(const mv_kernel_info *kernel) {
    enum { TOKENS = 3, HEADS = 4, KV_HEADS = 2, ROWS = 5 };
    static const int places[TOKENS] = {6, -1, 3}; /* block * ROWS + row */
    const mv_dtype dtype = kernel->dtype;
    HeadCase c;
    mv_plan plan;
    for (int number = 0; next_head(&c, number); number++) {
        const int64_t dim = c.dim;
        const Embedding e = new_embedding(kernel, &c, TOKENS);
        Tensor *q = filled(NEW(dtype, TOKENS, HEADS, dim), 0, 1), *k = filled(NEW(dtype, TOKENS, KV_HEADS, dim), 0, 1);
        Tensor *v = filled(NEW(dtype, TOKENS, KV_HEADS, dim), 0, 1);
        Tensor *out_q = NEW(dtype, TOKENS, HEADS, dim), *out_k = NEW(dtype, TOKENS, KV_HEADS, dim);
        Tensor *keys = NEW(dtype, 2, ROWS, KV_HEADS, dim), *values = NEW(dtype, 2, ROWS, KV_HEADS, dim);
        const Tensor *slots = integers(NEW(number % 2 ? MV_I64 : MV_I32, TOKENS), places);
        const mv_qk_norm_rope_args args = {.call.kernel = kernel->name,
                                           .q = q->view,
                                           .k = k->view,
                                           .cos = view_of(e.cosines),
                                           .sin = view_of(e.sines),
                                           .q_norm_weight = view_of(e.weight),
                                           .k_norm_weight = view_of(e.weight),
                                           .eps = head_eps,
                                           .interleaved = e.interleaved,
                                           .rounding = e.rounding,
                                           .out_q = out_q->view,
                                           .out_k = out_k->view,
                                           .v = v->view,
                                           .key_cache = keys->view,
                                           .value_cache = values->view,
                                           .slots = slots->view,
                                           .cache_layout = MV_CACHE_NHD};
        double y[256];
        if (run(kernel, mv_qk_norm_rope(&args, &plan, &error), &plan))
            for (int64_t t = 0; t < TOKENS; t++) {
                for (int64_t h = 0; h < HEADS; h++) {
                    prepare(&e, q, t * HEADS + h, dim, t, y);
                    compare_head(kernel, out_q, t * HEADS + h, y, dim, "out_q");
                }
                for (int64_t h = 0; h < KV_HEADS; h++) {
                    prepare(&e, k, t * KV_HEADS + h, dim, t, y);
                    compare_head(kernel, out_k, t * KV_HEADS + h, y, dim, "out_k");
                    for (int64_t i = 0; places[t] >= 0 && i < dim; i++) {
                        const int64_t cached = (places[t] * KV_HEADS + h) * dim + i,
                                      given = (t * KV_HEADS + h) * dim + i;
                        same(kernel, value_at(keys, cached), value_at(out_k, given), "a cached key");
                        same(kernel, value_at(values, cached), value_at(v, given), "a cached value");
                    }
                }
            }
        free_tensors();
    }
}

/* ---- decode_attention ----------------------------------------------------------------------------------------- */

typedef struct {
    int64_t rows, window;
    double soft_cap;
} KeyCase;

enum { SEQUENCES = 4, QUERY_HEADS = 10, KEY_HEADS = 2, GROUP = QUERY_HEADS / KEY_HEADS };

/* A query head against its keys. y: the query; then the result. Returns how far the weights may be off, as a factor. */
static double attend(const Tensor *keys, const Tensor *values, int64_t head, int64_t first, int64_t last, double scale,
                     double soft_cap, int64_t dim, double *y) {
    const int64_t rows = keys->shape[2];
    double most = -INFINITY, sum = 0, size = 0, out[256] = {0};
    double *scores = malloc((size_t)(last + 1) * sizeof *scores);
    if (!scores) exit(1);
    for (int64_t j = first; j <= last; j++) {
        double score = 0, magnitude = 0;
        for (int64_t i = 0; i < dim; i++) {
            const double term = scale * y[i] * value_at(keys, (head * rows + j) * dim + i);
            score += term;
            magnitude += fabs(term);
        }
        scores[j] = soft_cap > 0 ? soft_cap * tanh(score / soft_cap) : score;
        size = fmax(size, magnitude);
        most = fmax(most, scores[j]);
    }
    for (int64_t j = first; j <= last; j++) {
        const double p = exp(scores[j] - most);
        sum += p;
        for (int64_t i = 0; i < dim; i++) out[i] += p * value_at(values, (head * rows + j) * dim + i);
    }
    for (int64_t i = 0; i < dim; i++) y[i] = out[i] / sum;
    free(scores);
    return 4 * unit(MV_F32) * (size + fabs(most) + 8);
}

static void check_attention(const mv_kernel_info *kernel, const HeadCase *c, KeyCase of) {
    const mv_dtype dtype = kernel->dtype;
    const int64_t dim = c->dim;
    /* A full cache; the first row; none at all; a place that the cache does not have. */
    const int places[SEQUENCES] = {(int)of.rows - 1, 0, -1, (int)of.rows};
    const Embedding e = new_embedding(kernel, c, SEQUENCES);
    Tensor *q = filled(NEW(dtype, SEQUENCES, QUERY_HEADS, dim), 0, 1), *out = NEW(dtype, SEQUENCES, QUERY_HEADS, dim);
    Tensor *k = filled(NEW(dtype, SEQUENCES, KEY_HEADS, dim), 0, 1);
    Tensor *v = filled(NEW(dtype, SEQUENCES, KEY_HEADS, dim), 0, 1);
    Tensor *keys = filled(NEW(dtype, SEQUENCES, KEY_HEADS, of.rows, dim), 0, 1);
    Tensor *values = filled(NEW(dtype, SEQUENCES, KEY_HEADS, of.rows, dim), 0, 1);
    const Tensor *positions = integers(NEW(c->wide ? MV_I64 : MV_I32, SEQUENCES), places);
    const mv_decode_attention_args args = {.call.kernel = kernel->name,
                                           .q = q->view,
                                           .k = k->view,
                                           .v = v->view,
                                           .key_cache = keys->view,
                                           .value_cache = values->view,
                                           .positions = positions->view,
                                           .cos = view_of(e.cosines),
                                           .sin = view_of(e.sines),
                                           .q_norm_weight = view_of(e.weight),
                                           .k_norm_weight = view_of(e.weight),
                                           .eps = head_eps,
                                           .interleaved = e.interleaved,
                                           .window = of.window,
                                           .soft_cap = of.soft_cap,
                                           .out = out->view,
                                           .rounding = e.rounding};
    mv_plan plan;
    double y[256];
    const bool ran = run(kernel, mv_decode_attention(&args, &plan, &error), &plan);
    for (int64_t s = 0; ran && s < SEQUENCES; s++) {
        const int64_t last = places[s], first = of.window > 0 && last >= of.window ? last - of.window + 1 : 0;
        const bool served = last >= 0 && last < of.rows;
        for (int64_t h = 0; served && h < KEY_HEADS; h++) {
            const int64_t at = (s * KEY_HEADS + h) * of.rows + last;
            prepare(&e, k, s * KEY_HEADS + h, dim, s, y);
            compare_head(kernel, keys, at, y, dim, "the new key");
            for (int64_t i = 0; i < dim; i++)
                same(kernel, value_at(values, at * dim + i), value_at(v, (s * KEY_HEADS + h) * dim + i),
                     "the new value");
        }
        for (int64_t h = 0; h < QUERY_HEADS; h++) {
            const int64_t at = s * QUERY_HEADS + h;
            double off = 0;
            prepare(&e, q, at, dim, s, y);
            if (served)
                off = attend(keys, values, s * KEY_HEADS + h / GROUP, first, last, 1 / sqrt((double)dim), of.soft_cap,
                             dim, y);
            for (int64_t i = 0; i < dim; i++) {
                const double exact = served ? y[i] : last < 0 ? 0 : NAN;
                near(kernel, value_at(out, at * dim + i), exact,
                     2 * rounding_of(dtype, exact) + 4 * off + (e.weight || e.cosines) * unit(dtype) / 8, "out");
            }
        }
    }
    free_tensors();
}

static void check_decode_attention(const mv_kernel_info *kernel) {
    static const KeyCase keys[] = {{1, 0, 0}, {70, 0, 0}, {131, 40, 0}, {65, 0, 2}, {1100, 0, 0}};
    HeadCase c;
    for (int number = 0; next_head(&c, number); number++) check_attention(kernel, &c, keys[number % 5]);
}

#endif

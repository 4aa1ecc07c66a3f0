/* decode_attention.c: one new token per sequence against its cache: what it requires, and its kernels. */
#include <math.h>

#include "../cpu/cpu.h"
#include "heads.h"
#include "plan.h"
#ifdef MV_WITH_CUDA
#include "../cuda/cuda.h"
#endif

/* ---- the kernels ---------------------------------------------------------------------------------------------- */

/*                              name      isa       backend  invariant  decide */
#define DECODE_ATTENTION_KERNELS(K)                                                                                    \
    MV_GPU(MV_16BIT_DTYPES(K, decode_attention, mma_sm90a, sm90a, MV_CUDA, true, mv_attention_mma_sm90a_decide))       \
    MV_GPU(MV_16BIT_DTYPES(K, decode_attention, mma_sm80, sm80, MV_CUDA, true, mv_attention_mma_sm80_decide))          \
    MV_GPU(MV_ALL_DTYPES(K, decode_attention, sm80, sm80, MV_CUDA, true, mv_attention_sm80_decide))                    \
    MV_X86(MV_ALL_DTYPES(K, decode_attention, avx512, avx512, MV_CPU, true, mv_attention_avx512_decide))               \
    MV_X86(MV_ALL_DTYPES(K, decode_attention, avx2, avx2, MV_CPU, true, mv_attention_avx2_decide))                     \
    MV_ARM64(MV_ALL_DTYPES(K, decode_attention, neon, neon, MV_CPU, true, mv_attention_neon_decide))                   \
    MV_ALL_DTYPES(K, decode_attention, portable, portable, MV_CPU, true, mv_attention_portable_decide)

DECODE_ATTENTION_KERNELS(MV_DECLARE_KERNEL)
static const mv_row rows[] = {DECODE_ATTENTION_KERNELS(MV_TABLE_ROW)};
const mv_list mv_decode_attention_list = MV_LIST("decode_attention", rows);

/* ---- what it requires ----------------------------------------------------------------------------------------- */

enum { MOST_ROWS = 1 << 30 };

/* The call, and what its shapes say. */
typedef struct {
    const char *op;
    const mv_decode_attention_args *args;
    int64_t sequences, heads, kv_heads, dim;
    int64_t rows, block_rows, blocks; /* as mv_attention's */
} shape;

static mv_named named(const shape *s, const char *name, const mv_view *view) { return (mv_named){s->op, name, view}; }

static mv_status check_kind(const shape *s, mv_named t, bool or_float32, mv_error *error) {
    return mv_check_kind(t, named(s, "q", &s->args->q), or_float32, error);
}

static bool is_token_row(const mv_view *view) { return view->ndim == 3 || (view->ndim == 4 && view->shape[1] == 1); }

static mv_status read_q(shape *s, mv_error *error) {
    const mv_view *q = &s->args->q;
    const mv_named t = named(s, "q", q);
    MV_TRY(mv_check_q(t, error));
    MV_REQUIRE(is_token_row(q), MV_BAD_VALUE,
               "%s: q has shape %s, expected [sequences, heads, head_dim] or [sequences, 1, heads, head_dim]: one new "
               "token per sequence",
               s->op, mv_shape_text(q).text);
    s->sequences = q->shape[0];
    s->heads = q->shape[q->ndim - 2];
    s->dim = q->shape[q->ndim - 1];
    MV_REQUIRE(s->heads >= 1 && s->dim >= 1, MV_BAD_VALUE, "%s: q has shape %s, expected a head and a column at least",
               s->op, mv_shape_text(q).text);
    MV_REQUIRE(s->dim <= MV_MOST_HEAD_COLUMNS, MV_BAD_VALUE, "%s: q has heads of %lld columns, expected %d at most",
               s->op, (long long)s->dim, MV_MOST_HEAD_COLUMNS);
    return mv_check_last_contiguous(t, error);
}

/* k, v: of q's rank or not. */
static mv_status check_heads(const shape *s, mv_named t, int64_t heads, const char *meaning, mv_error *error) {
    const mv_view *view = t.view;
    MV_TRY(check_kind(s, t, false, error));
    MV_REQUIRE(is_token_row(view) && view->shape[0] == s->sequences && view->shape[view->ndim - 2] == heads &&
                   view->shape[view->ndim - 1] == s->dim,
               MV_BAD_VALUE, "%s: %s has shape %s, expected [%lld, %lld, %lld] (%s)", t.op, t.name,
               mv_shape_text(view).text, (long long)s->sequences, (long long)heads, (long long)s->dim, meaning);
    return mv_check_last_contiguous(t, error);
}

static mv_status read_k_and_v(shape *s, mv_error *error) {
    const mv_view *k = &s->args->k;
    s->kv_heads = k->ndim >= 3 ? k->shape[k->ndim - 2] : 0;
    if (s->kv_heads < 1) s->kv_heads = 1;
    MV_TRY(check_heads(s, named(s, "k", k), s->kv_heads, "sequences, kv_heads and head_dim", error));
    MV_TRY(check_heads(s, named(s, "v", &s->args->v), s->kv_heads, "the shape of k", error));
    MV_REQUIRE(s->heads % s->kv_heads == 0, MV_BAD_VALUE,
               "%s: q has %lld heads, expected a multiple of %lld (those of k and v)", s->op, (long long)s->heads,
               (long long)s->kv_heads);
    return MV_OK;
}

/* ---- caches */

static mv_status read_caches(shape *s, mv_error *error) {
    const mv_decode_attention_args *a = s->args;
    const mv_view *keys = &a->key_cache;
    const bool paged = mv_present(&a->block_table);
    MV_REQUIRE(paged == (a->cache_layout != MV_CACHE_STATIC), MV_BAD_VALUE,
               paged ? "%s: cache_layout is missing, expected \"NHD\" or \"HND\": a block_table is given"
                     : "%s: cache_layout was given without a block_table, but a cache without pages has one layout, "
                       "[sequences, kv_heads, rows, head_dim]",
               s->op);
    const int row_dim = mv_cache_row_dim(a->cache_layout);
    const bool has_rows = keys->ndim == 4 && keys->shape[0] >= 0;
    s->blocks = paged ? (has_rows ? keys->shape[0] : 0) : s->sequences;
    s->block_rows = has_rows ? keys->shape[row_dim] : 0;
    int64_t expected[4] = {s->blocks, 0, 0, s->dim};
    expected[row_dim] = s->block_rows;
    expected[mv_cache_head_dim(a->cache_layout)] = s->kv_heads;
    const mv_named q = named(s, "q", &a->q);
    MV_TRY(mv_check_cache(named(s, "key_cache", keys), q, expected, mv_cache_meaning(a->cache_layout), error));
    MV_TRY(mv_check_cache(named(s, "value_cache", &a->value_cache), q, expected, "the shape of key_cache", error));
    MV_REQUIRE(s->block_rows >= 1, MV_BAD_VALUE, "%s: key_cache has shape %s, expected a row at least", s->op,
               mv_shape_text(keys).text);
    return MV_OK;
}

static mv_status check_indices(const shape *s, mv_named t, bool or_int64, mv_error *error) {
    MV_REQUIRE(t.view->dtype == MV_I32 || (or_int64 && t.view->dtype == MV_I64), MV_BAD_TYPE,
               "%s: %s is %s, expected int32%s", t.op, t.name, mv_dtype_name(t.view->dtype),
               or_int64 ? " or int64" : "");
    return mv_check_place(t, named(s, "q", &s->args->q), error);
}

/* [sequences], or one for all of them. */
static mv_status check_per_sequence(const shape *s, mv_named t, mv_error *error) {
    MV_TRY(check_indices(s, t, true, error));
    MV_REQUIRE(t.view->ndim == 0 || (t.view->ndim == 1 && t.view->shape[0] == s->sequences), MV_BAD_VALUE,
               "%s: %s has shape %s, expected [%lld] (one for each sequence) or []", t.op, t.name,
               mv_shape_text(t.view).text, (long long)s->sequences);
    return MV_OK;
}

static mv_status read_block_table(shape *s, mv_error *error) {
    const mv_view *table = &s->args->block_table;
    const mv_named t = named(s, "block_table", table);
    s->rows = s->block_rows;
    if (mv_present(table)) {
        MV_TRY(check_indices(s, t, false, error));
        MV_REQUIRE(table->ndim == 2 && table->shape[0] == s->sequences, MV_BAD_VALUE,
                   "%s: block_table has shape %s, expected [%lld, blocks] (a row of pages for each sequence)", s->op,
                   mv_shape_text(table).text, (long long)s->sequences);
        MV_TRY(mv_check_last_contiguous(t, error));
        MV_REQUIRE(table->shape[1] >= 1, MV_BAD_VALUE, "%s: block_table has no columns, expected at least one page",
                   s->op);
        MV_REQUIRE(s->blocks <= INT32_MAX, MV_BAD_VALUE, "%s: key_cache has %lld pages, expected fewer than 2^31",
                   s->op, (long long)s->blocks);
        if (s->rows <= MOST_ROWS && table->shape[1] <= MOST_ROWS) s->rows *= table->shape[1];
    }
    MV_REQUIRE(s->rows <= MOST_ROWS, MV_BAD_VALUE, "%s: a sequence has %lld rows in the cache, expected at most 2^30",
               s->op, (long long)s->rows);
    return MV_OK;
}

/* ---- the rest */

static mv_status check_rotary_rows(const shape *s, mv_named t, mv_error *error) {
    const mv_view *view = t.view;
    MV_TRY(check_kind(s, t, true, error));
    bool fits = view->ndim >= 1 && view->shape[view->ndim - 1] >= 2 && view->shape[view->ndim - 1] % 2 == 0 &&
                view->shape[view->ndim - 1] <= s->dim;
    for (int d = 0; d < view->ndim - 1; d++)
        fits = fits && (view->shape[d] == 1 || (d == 0 && view->shape[d] == s->sequences));
    MV_REQUIRE(fits, MV_BAD_VALUE,
               "%s: %s has shape %s, expected [%lld, R] or [1, R] (rows gathered by position, R even and at most %lld)",
               t.op, t.name, mv_shape_text(view).text, (long long)s->sequences, (long long)s->dim);
    return mv_check_last_contiguous(t, error);
}

static mv_status check_rotary(const shape *s, mv_error *error) {
    const mv_named cosines = named(s, "cos", &s->args->cos), sines = named(s, "sin", &s->args->sin);
    MV_TRY(mv_check_both_rotary(cosines, sines, error));
    if (!mv_present(cosines.view)) return MV_OK;
    MV_TRY(check_rotary_rows(s, cosines, error));
    MV_TRY(check_rotary_rows(s, sines, error));
    return mv_check_rotary_pair(cosines, sines, error);
}

static mv_status check_options(const shape *s, mv_error *error) {
    const mv_decode_attention_args *a = s->args;
    MV_TRY(mv_check_numbers(s->op, a->eps, a->weight_offset, a->rounding, error));
    MV_REQUIRE(isfinite(a->scale) && a->scale >= 0, MV_BAD_VALUE, "%s: scale is %g, expected a finite number > 0",
               s->op, a->scale);
    MV_REQUIRE(isfinite(a->soft_cap) && a->soft_cap >= 0, MV_BAD_VALUE,
               "%s: soft_cap is %g, expected a finite number > 0", s->op, a->soft_cap);
    MV_REQUIRE(a->window >= 0, MV_BAD_VALUE, "%s: window is %lld, expected at least 1", s->op, (long long)a->window);
    MV_REQUIRE(!a->ring || !mv_present(&a->block_table), MV_BAD_VALUE,
               "%s: ring was given with a block_table; a ring has no pages", s->op);
    MV_REQUIRE(!a->ring || (a->window >= 1 && a->window <= s->rows), MV_BAD_VALUE,
               a->window ? "%s: window is %lld, expected at most %lld: a ring keeps no more rows"
                         : "%s: window is missing (%lld), expected at most %lld: a ring keeps no more rows",
               s->op, (long long)a->window, (long long)s->rows);
    return MV_OK;
}

static mv_status check_outputs(const shape *s, mv_error *error) {
    const mv_decode_attention_args *a = s->args;
    const mv_named inputs[] = {
        named(s, "q", &a->q),
        named(s, "k", &a->k),
        named(s, "v", &a->v),
        named(s, "positions", &a->positions),
        named(s, "cos", &a->cos),
        named(s, "sin", &a->sin),
        named(s, "q_norm_weight", &a->q_norm_weight),
        named(s, "k_norm_weight", &a->k_norm_weight),
        named(s, "block_table", &a->block_table),
        named(s, "starts", &a->starts),
    };
    const mv_named keys = named(s, "key_cache", &a->key_cache), values = named(s, "value_cache", &a->value_cache);
    const mv_named out = named(s, "out", &a->out);
    if (mv_present(&a->out)) {
        MV_TRY(check_kind(s, out, false, error));
        MV_TRY(mv_check_output(out, &a->q, s->dim, error));
    }
    for (size_t i = 0; i < sizeof inputs / sizeof inputs[0]; i++) {
        MV_TRY(mv_check_apart(keys, inputs[i], false, error));
        MV_TRY(mv_check_apart(values, inputs[i], false, error));
        MV_TRY(mv_check_apart(out, inputs[i], false, error));
    }
    MV_TRY(mv_check_apart(keys, values, false, error));
    MV_TRY(mv_check_apart(out, keys, false, error));
    return mv_check_apart(out, values, false, error);
}

static mv_status read_shape(shape *s, mv_error *error) {
    const mv_decode_attention_args *a = s->args;
    MV_TRY(read_q(s, error));
    MV_TRY(read_k_and_v(s, error));
    MV_TRY(read_caches(s, error));
    MV_TRY(check_per_sequence(s, named(s, "positions", &a->positions), error));
    MV_TRY(check_rotary(s, error));
    const mv_named q = named(s, "q", &a->q);
    MV_TRY(mv_check_head_norm(named(s, "q_norm_weight", &a->q_norm_weight), q, s->dim, error));
    MV_TRY(mv_check_head_norm(named(s, "k_norm_weight", &a->k_norm_weight), q, s->dim, error));
    MV_TRY(read_block_table(s, error));
    if (mv_present(&a->starts)) MV_TRY(check_per_sequence(s, named(s, "starts", &a->starts), error));
    MV_TRY(check_options(s, error));
    return check_outputs(s, error);
}

/* ---- the plan --------------------------------------------------------------------------------------------------- */

static mv_rows token_rows(const mv_view *view) {
    return (mv_rows){view->data, mv_stride(view, 0), mv_stride(view, view->ndim - 2)};
}

static mv_integers integers_of(const mv_view *view) {
    return (mv_integers){view->data, view->ndim ? mv_stride(view, 0) : 0, view->dtype == MV_I64};
}

static mv_rotary rotary_of(const mv_decode_attention_args *a) {
    if (!mv_present(&a->cos)) return (mv_rotary){0};
    return (mv_rotary){.cos = a->cos.data,
                       .sin = a->sin.data,
                       .dtype = a->cos.dtype,
                       .cos_stride = a->cos.ndim > 1 ? mv_stride(&a->cos, 0) : 0,
                       .sin_stride = a->sin.ndim > 1 ? mv_stride(&a->sin, 0) : 0,
                       .columns = a->cos.shape[a->cos.ndim - 1],
                       .interleaved = a->interleaved};
}

static mv_attention attention_of(const shape *s) {
    const mv_decode_attention_args *a = s->args;
    return (mv_attention){.heads = s->heads,
                          .kv_heads = s->kv_heads,
                          .k = token_rows(&a->k),
                          .v = token_rows(&a->v),
                          .q_norm = mv_head_norm_of(&a->q_norm_weight, a->eps, a->weight_offset),
                          .k_norm = mv_head_norm_of(&a->k_norm_weight, a->eps, a->weight_offset),
                          .rotary = rotary_of(a),
                          .keys = mv_cache_of(&a->key_cache, a->cache_layout),
                          .values = mv_cache_of(&a->value_cache, a->cache_layout),
                          .rows = s->rows,
                          .block_rows = s->block_rows,
                          .blocks = s->blocks,
                          .block_table = a->block_table.data,
                          .table_stride = mv_present(&a->block_table) ? mv_stride(&a->block_table, 0) : 0,
                          .ring = a->ring,
                          .static_rows = a->static_rows,
                          .positions = integers_of(&a->positions),
                          .starts = integers_of(&a->starts),
                          .window = a->window ? a->window : INT64_MAX,
                          .scale = (float)(a->scale > 0 ? a->scale : 1 / sqrt((double)s->dim)),
                          .soft_cap = (float)a->soft_cap};
}

mv_status mv_decode_attention(const mv_decode_attention_args *a, mv_plan *plan, mv_error *error) {
    shape s = {.op = a->call.op ? a->call.op : "decode_attention", .args = a};
    MV_TRY(read_shape(&s, error));
    const mv_row_view rows_of[] = {MV_READS(&a->q, s.dim, x),
                                   {&a->out, s.dim, offsetof(mv_task, out), .output = "out"}};
    MV_TRY(mv_start_plan(plan, &mv_decode_attention_list, s.op, &a->call, rows_of, 2, error));
    mv_task *task = &mv_state(plan)->part[0].task;
    task->rounding = a->rounding;
    task->batch_invariant = a->batch_invariant;
    task->static_weights = a->static_weights;
    task->attention = attention_of(&s);
    return mv_finish_plan(plan, error);
}

/* qk_norm_rope.c: norm and rotary embedding of the heads of q and k, and their cache: what it requires, its kernels. */
#include "../cpu/cpu.h"
#include "heads.h"
#include "plan.h"

/* ---- the kernels ---------------------------------------------------------------------------------------------- */

/*                          name      isa       backend  invariant  decide */
#define QK_NORM_ROPE_KERNELS(K)                                                                                        \
    MV_GPU(MV_ALL_DTYPES(K, qk_norm_rope, sm80, sm80, MV_CUDA, true, mv_decide_wide))                                  \
    MV_X86(MV_ALL_DTYPES(K, qk_norm_rope, avx512, avx512, MV_CPU, true, mv_decide_wide))                               \
    MV_X86(MV_ALL_DTYPES(K, qk_norm_rope, avx2, avx2, MV_CPU, true, mv_decide_half))                                   \
    MV_ARM64(MV_ALL_DTYPES(K, qk_norm_rope, neon, neon, MV_CPU, true, mv_decide_half))                                 \
    MV_ALL_DTYPES(K, qk_norm_rope, portable, portable, MV_CPU, true, mv_decide_scalar)

QK_NORM_ROPE_KERNELS(MV_DECLARE_KERNEL)
static const mv_row rows[] = {QK_NORM_ROPE_KERNELS(MV_TABLE_ROW)};
const mv_list mv_qk_norm_rope_list = MV_LIST("qk_norm_rope", rows);

/* ---- tokens --------------------------------------------------------------------------------------------------- */

/* The call, and what its shapes say. */
typedef struct {
    const char *op;
    const mv_qk_norm_rope_args *args;
    int leads;             /* dimensions of the tokens, the first ones of q */
    const int64_t *tokens; /* their sizes                                   */
    int64_t heads, kv_heads, dim;
} shape;

static mv_named named(const shape *s, const char *name, const mv_view *view) { return (mv_named){s->op, name, view}; }
static mv_named q_of(const shape *s) { return named(s, "q", &s->args->q); }

static bool has_tokens(const shape *s, const mv_view *view) {
    if (view->ndim < s->leads) return false;
    for (int d = 0; d < s->leads; d++)
        if (view->shape[d] != s->tokens[d]) return false;
    return true;
}

static mv_text tokens_text(const shape *s) {
    const mv_view view = {.shape = s->tokens, .ndim = s->leads};
    return mv_shape_text(&view);
}

/* For each dimension of the tokens the one of `view`, whose last dimension is none of theirs, that goes along with it,
 * or -1: as NumPy broadcasts them, or where that fails with dimensions of 1 left out. */
static bool match_tokens(const shape *s, const mv_view *view, int along[MV_MAX_DIMS]) {
    const int dims = view->ndim - 1, before = s->leads - dims;
    bool fits = before >= 0;
    for (int d = 0; d < s->leads && fits; d++) {
        const int64_t size = d < before ? 1 : view->shape[d - before];
        along[d] = size == 1 ? -1 : d - before;
        fits = size == 1 || size == s->tokens[d];
    }
    if (fits) return true;
    int at = 0;
    for (int d = 0; d < s->leads; d++) {
        along[d] = -1;
        if (s->tokens[d] == 1) continue;
        while (at < dims && view->shape[at] == 1) at++;
        if (at == dims || view->shape[at] != s->tokens[d]) return false;
        along[d] = at++;
    }
    while (at < dims && view->shape[at] == 1) at++;
    return at == dims;
}

/* ---- what it requires ----------------------------------------------------------------------------------------- */

static mv_status read_q(shape *s, mv_error *error) {
    const mv_view *q = &s->args->q;
    MV_TRY(mv_check_q(q_of(s), error));
    MV_REQUIRE(q->ndim >= 2 && q->shape[q->ndim - 2] >= 1 && q->shape[q->ndim - 1] >= 1, MV_BAD_VALUE,
               "%s: q has shape %s, expected [..., heads, head_dim], a head and a column at least", s->op,
               mv_shape_text(q).text);
    s->leads = q->ndim - 2;
    s->tokens = q->shape;
    s->heads = q->shape[q->ndim - 2];
    s->dim = q->shape[q->ndim - 1];
    MV_REQUIRE(s->dim <= MV_MOST_HEAD_COLUMNS, MV_BAD_VALUE, "%s: q has heads of %lld columns, expected %d at most",
               s->op, (long long)s->dim, MV_MOST_HEAD_COLUMNS);
    return mv_check_last_contiguous(q_of(s), error);
}

static mv_status check_heads(const shape *s, mv_named t, mv_error *error) {
    const mv_view *view = t.view;
    MV_TRY(mv_check_kind(t, q_of(s), false, error));
    MV_REQUIRE(view->ndim == s->leads + 2 && has_tokens(s, view) && view->shape[s->leads] >= 1 &&
                   (!s->kv_heads || view->shape[s->leads] == s->kv_heads) && view->shape[s->leads + 1] == s->dim,
               MV_BAD_VALUE, "%s: %s has shape %s, expected [*%s, %s, %lld] (q's tokens and head_dim)", t.op, t.name,
               mv_shape_text(view).text, tokens_text(s).text, s->kv_heads ? "k's heads" : "kv_heads",
               (long long)s->dim);
    return mv_check_last_contiguous(t, error);
}

static mv_status check_rotary_rows(const shape *s, mv_named t, int *along, mv_error *error) {
    const mv_view *view = t.view;
    MV_TRY(mv_check_kind(t, q_of(s), true, error));
    const int64_t columns = view->ndim >= 1 ? view->shape[view->ndim - 1] : 0;
    MV_REQUIRE(columns >= 2 && columns % 2 == 0 && columns <= s->dim && match_tokens(s, view, along), MV_BAD_VALUE,
               "%s: %s has shape %s, expected [..., R] (rows gathered by position, R even and at most %lld) whose "
               "leading dimensions broadcast to %s (q's tokens)",
               t.op, t.name, mv_shape_text(view).text, (long long)s->dim, tokens_text(s).text);
    return mv_check_last_contiguous(t, error);
}

static mv_status check_rotary(const shape *s, int *along_cos, int *along_sin, mv_error *error) {
    const mv_named cosines = named(s, "cos", &s->args->cos), sines = named(s, "sin", &s->args->sin);
    MV_TRY(mv_check_both_rotary(cosines, sines, error));
    if (!mv_present(cosines.view)) return MV_OK;
    MV_TRY(check_rotary_rows(s, cosines, along_cos, error));
    MV_TRY(check_rotary_rows(s, sines, along_sin, error));
    return mv_check_rotary_pair(cosines, sines, error);
}

static mv_status check_slots(const shape *s, mv_error *error) {
    const mv_view *slots = &s->args->slots;
    MV_REQUIRE(slots->dtype == MV_I32 || slots->dtype == MV_I64, MV_BAD_TYPE,
               "%s: slots is %s, expected int32 or int64", s->op, mv_dtype_name(slots->dtype));
    MV_TRY(mv_check_place(named(s, "slots", slots), q_of(s), error));
    MV_REQUIRE(slots->ndim == s->leads && has_tokens(s, slots), MV_BAD_VALUE,
               "%s: slots has shape %s, expected %s (one for each of q's tokens)", s->op, mv_shape_text(slots).text,
               tokens_text(s).text);
    return MV_OK;
}

static mv_status check_caches(const shape *s, mv_error *error) {
    const mv_qk_norm_rope_args *a = s->args;
    const mv_named parts[] = {named(s, "v", &a->v), named(s, "key_cache", &a->key_cache),
                              named(s, "value_cache", &a->value_cache), named(s, "slots", &a->slots)};
    enum { PARTS = sizeof parts / sizeof parts[0] };
    const char *given = NULL, *missing = NULL;
    for (int i = 0; i < PARTS; i++) *(mv_present(parts[i].view) ? &given : &missing) = parts[i].name;
    MV_REQUIRE(!given || !missing, MV_BAD_VALUE,
               "%s: %s was given without %s, but a cache needs v, key_cache, value_cache and slots", s->op, given,
               missing);
    MV_REQUIRE(given || a->cache_layout == MV_CACHE_STATIC, MV_BAD_VALUE,
               "%s: cache_layout was given without a key_cache", s->op);
    if (!given) return MV_OK;
    MV_TRY(check_heads(s, parts[0], error));
    const mv_view *keys = &a->key_cache;
    const int row_dim = mv_cache_row_dim(a->cache_layout);
    int64_t expected[4] = {keys->ndim == 4 ? keys->shape[0] : 0, 0, 0, s->dim};
    expected[row_dim] = keys->ndim == 4 ? keys->shape[row_dim] : 0;
    expected[mv_cache_head_dim(a->cache_layout)] = s->kv_heads;
    MV_TRY(mv_check_cache(parts[1], q_of(s), expected, mv_cache_meaning(a->cache_layout), error));
    MV_TRY(mv_check_cache(parts[2], q_of(s), expected, "the shape of key_cache", error));
    MV_REQUIRE(expected[row_dim] >= 1, MV_BAD_VALUE, "%s: key_cache has shape %s, expected a row at least", s->op,
               mv_shape_text(keys).text);
    return check_slots(s, error);
}

static mv_status check_outputs(const shape *s, mv_error *error) {
    const mv_qk_norm_rope_args *a = s->args;
    const mv_named q = q_of(s), k = named(s, "k", &a->k);
    const mv_named outputs[] = {named(s, "out_q", &a->out_q), named(s, "out_k", &a->out_k),
                                named(s, "key_cache", &a->key_cache), named(s, "value_cache", &a->value_cache)};
    const mv_named inputs[] = {q,
                               k,
                               named(s, "cos", &a->cos),
                               named(s, "sin", &a->sin),
                               named(s, "q_norm_weight", &a->q_norm_weight),
                               named(s, "k_norm_weight", &a->k_norm_weight),
                               named(s, "v", &a->v),
                               named(s, "slots", &a->slots)};
    for (int i = 0; i < 2; i++) {
        if (!mv_present(outputs[i].view)) continue;
        MV_TRY(mv_check_kind(outputs[i], q, false, error));
        MV_TRY(mv_check_output(outputs[i], inputs[i].view, s->dim, error));
    }
    for (size_t o = 0; o < sizeof outputs / sizeof outputs[0]; o++) {
        for (size_t i = 0; i < sizeof inputs / sizeof inputs[0]; i++)
            MV_TRY(mv_check_apart(outputs[o], inputs[i], o == i, error));
        for (size_t i = 0; i < o; i++) MV_TRY(mv_check_apart(outputs[o], outputs[i], false, error));
    }
    return MV_OK;
}

/* ---- the plan ------------------------------------------------------------------------------------------------- */

/* Of an output that is absent, as it will be made: C-contiguous. */
static int64_t head_stride(const shape *s, const mv_view *view) {
    return mv_present(view) ? mv_stride(view, s->leads) : s->dim;
}

static void fill_task(const shape *s, mv_task *task) {
    const mv_qk_norm_rope_args *a = s->args;
    mv_qk *qk = &task->qk;
    task->rounding = a->rounding;
    qk->heads = s->heads;
    qk->kv_heads = s->kv_heads;
    qk->q_stride = head_stride(s, &a->q);
    qk->k_stride = head_stride(s, &a->k);
    qk->v_stride = head_stride(s, &a->v);
    qk->out_q_stride = head_stride(s, &a->out_q);
    qk->out_k_stride = head_stride(s, &a->out_k);
    qk->q_norm = mv_head_norm_of(&a->q_norm_weight, a->eps, a->weight_offset);
    qk->k_norm = mv_head_norm_of(&a->k_norm_weight, a->eps, a->weight_offset);
    if (mv_present(&a->cos)) {
        qk->rotary.dtype = a->cos.dtype;
        qk->rotary.columns = a->cos.shape[a->cos.ndim - 1];
        qk->rotary.interleaved = a->interleaved;
    }
    if (mv_present(&a->key_cache)) {
        qk->wide_slots = a->slots.dtype == MV_I64;
        qk->keys = mv_cache_of(&a->key_cache, a->cache_layout);
        qk->values = mv_cache_of(&a->value_cache, a->cache_layout);
        qk->blocks = a->key_cache.shape[0];
        qk->block_rows = a->key_cache.shape[mv_cache_row_dim(a->cache_layout)];
    }
}

mv_status mv_qk_norm_rope(const mv_qk_norm_rope_args *a, mv_plan *plan, mv_error *error) {
    shape s = {.op = a->call.op ? a->call.op : "qk_norm_rope", .args = a};
    int along_cos[MV_MAX_DIMS], along_sin[MV_MAX_DIMS];
    MV_TRY(mv_check_numbers(s.op, a->eps, a->weight_offset, a->rounding, error));
    MV_TRY(read_q(&s, error));
    MV_TRY(check_heads(&s, named(&s, "k", &a->k), error));
    s.kv_heads = a->k.shape[s.leads];
    MV_TRY(check_rotary(&s, along_cos, along_sin, error));
    MV_TRY(mv_check_head_norm(named(&s, "q_norm_weight", &a->q_norm_weight), q_of(&s), s.dim, error));
    MV_TRY(mv_check_head_norm(named(&s, "k_norm_weight", &a->k_norm_weight), q_of(&s), s.dim, error));
    MV_TRY(check_caches(&s, error));
    MV_TRY(check_outputs(&s, error));

    const mv_row_view tokens[] = {
        {&a->q, 0, offsetof(mv_task, x), .has_heads = true},
        MV_READS(&a->k, 0, qk.k),
        MV_READS(&a->v, 0, qk.v),
        MV_READS(&a->slots, 0, qk.slots),
        {&a->cos, 0, offsetof(mv_task, qk.cos), .along = along_cos},
        {&a->sin, 0, offsetof(mv_task, qk.sin), .along = along_sin},
        {&a->out_q, s.heads * s.dim, offsetof(mv_task, out), .output = "out_q"},
        {&a->out_k, s.kv_heads * s.dim, offsetof(mv_task, qk.out_k), .output = "out_k"},
    };
    mv_task *task = &mv_state(plan)->part[0].task;
    task->qk = (mv_qk){0};
    MV_TRY(mv_start_plan(plan, &mv_qk_norm_rope_list, s.op, &a->call, tokens, sizeof tokens / sizeof tokens[0], error));
    plan->output[0] = (mv_output){"out_q", &a->q, s.dim, a->q.dtype};
    plan->output[1] = (mv_output){"out_k", &a->k, s.dim, a->q.dtype};
    fill_task(&s, task);
    MV_TRY(mv_finish_plan(plan, error));
    plan->is_long = plan->is_long || (mv_state(plan)->parts > 0 && task->device.kind == MV_CPU &&
                                      mv_is_long_on_cpu(task->tokens * (s.heads + s.kv_heads), s.dim, 0));
    return MV_OK;
}

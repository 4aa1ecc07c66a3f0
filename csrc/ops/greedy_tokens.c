/* greedy_tokens.c: the next token of each row of logits: what it requires, and its kernels. */
#include "../cpu/cpu.h"
#include "plan.h"
#ifdef MV_WITH_CUDA
#include "../cuda/cuda.h"
#endif

/* ---- the kernels ---------------------------------------------------------------------------------------------- */

/*                           name      isa       backend  invariant  decide */
#define GREEDY_TOKENS_KERNELS(K)                                                                                       \
    MV_GPU(MV_ALL_DTYPES(K, greedy_tokens, sm90a, sm90a, MV_CUDA, true, mv_greedy_sm90a_decide))                       \
    MV_GPU(MV_ALL_DTYPES(K, greedy_tokens, sm80, sm80, MV_CUDA, true, mv_greedy_sm80_decide))                          \
    MV_X86(MV_ALL_DTYPES(K, greedy_tokens, avx512, avx512, MV_CPU, true, mv_decide_wide_except_zen4))                  \
    MV_X86(MV_ALL_DTYPES(K, greedy_tokens, avx2, avx2, MV_CPU, true, mv_decide_half))                                  \
    MV_ARM64(MV_ALL_DTYPES(K, greedy_tokens, neon, neon, MV_CPU, true, mv_decide_half))                                \
    MV_ALL_DTYPES(K, greedy_tokens, portable, portable, MV_CPU, true, mv_decide_scalar)

GREEDY_TOKENS_KERNELS(MV_DECLARE_KERNEL)
static const mv_row rows[] = {GREEDY_TOKENS_KERNELS(MV_TABLE_ROW)};
const mv_list mv_greedy_tokens_list = MV_LIST("greedy_tokens", rows);

/* ---- what it requires ----------------------------------------------------------------------------------------- */

typedef struct {
    const char *op;
    const mv_greedy_tokens_args *args;
    int64_t vocabulary;
} shape;

static mv_named named(const shape *s, const char *name, const mv_view *view) { return (mv_named){s->op, name, view}; }
static mv_named logits_of(const shape *s) { return named(s, "logits", &s->args->logits); }

static mv_status read_logits(shape *s, mv_error *error) {
    const mv_view *logits = &s->args->logits;
    const mv_named t = logits_of(s);
    MV_TRY(mv_check_floating(t, error));
    MV_TRY(mv_check_place(t, t, error));
    s->vocabulary = logits->ndim > 0 ? logits->shape[logits->ndim - 1] : 0;
    MV_REQUIRE(s->vocabulary >= 1, MV_BAD_VALUE,
               "%s: logits has shape %s, expected [..., vocabulary], a token at least", s->op,
               mv_shape_text(logits).text);
    MV_REQUIRE(s->vocabulary <= INT32_MAX, MV_BAD_VALUE, "%s: logits has shape %s, expected fewer than 2^31 tokens",
               s->op, mv_shape_text(logits).text);
    return mv_check_last_contiguous(t, error);
}

static mv_status check_kind(const shape *s, mv_named t, mv_dtype dtype, mv_error *error) {
    MV_REQUIRE(t.view->dtype == dtype, MV_BAD_TYPE, "%s: %s is %s, expected %s; convert it", t.op, t.name,
               mv_dtype_name(t.view->dtype), mv_dtype_name(dtype));
    return mv_check_place(t, logits_of(s), error);
}

/* [..., vocabulary] without the last dimension, or with another one in its place. */
static mv_status check_of_rows(const shape *s, mv_named t, mv_dtype dtype, bool has_columns, mv_error *error) {
    if (!mv_present(t.view)) return MV_OK;
    const mv_view *logits = &s->args->logits, *view = t.view, lead = {.shape = logits->shape, .ndim = logits->ndim - 1};
    MV_TRY(check_kind(s, t, dtype, error));
    bool fits = view->ndim == lead.ndim + has_columns;
    for (int d = 0; fits && d < lead.ndim; d++) fits = view->shape[d] == lead.shape[d];
    MV_REQUIRE(fits, MV_BAD_VALUE, "%s: %s has shape %s, expected %s%s (%s for each row of logits)", t.op, t.name,
               mv_shape_text(view).text, mv_shape_text(&lead).text, has_columns ? " and a length" : "",
               has_columns ? "a row" : "one");
    if (has_columns) MV_TRY(mv_check_last_contiguous(t, error));
    return mv_check_writable(t, error);
}

static mv_status check_together(const mv_named *parts, int count, mv_error *error) {
    const char *given = NULL, *missing = NULL;
    for (int i = 0; i < count; i++) *(mv_present(parts[i].view) ? &given : &missing) = parts[i].name;
    MV_REQUIRE(!given || !missing, MV_BAD_VALUE, "%s: %s was given without %s; pass both", parts->op, given, missing);
    return MV_OK;
}

static mv_status check_ends(const shape *s, mv_named ends, mv_named pad, mv_error *error) {
    if (!mv_present(ends.view)) return MV_OK;
    MV_TRY(check_kind(s, ends, MV_BOOL, error));
    MV_REQUIRE(ends.view->ndim == 1 && ends.view->shape[0] == s->vocabulary, MV_BAD_VALUE,
               "%s: ends has shape %s, expected [%lld] (does a token of the vocabulary end its sequence?)", s->op,
               mv_shape_text(ends.view).text, (long long)s->vocabulary);
    MV_TRY(mv_check_last_contiguous(ends, error));
    MV_TRY(check_kind(s, pad, MV_I64, error));
    MV_REQUIRE(pad.view->ndim == 0 || (pad.view->ndim == 1 && pad.view->shape[0] == 1), MV_BAD_VALUE,
               "%s: pad has shape %s, expected [] or [1] (the token of sequences that are finished)", s->op,
               mv_shape_text(pad.view).text);
    return MV_OK;
}

static mv_status check(const shape *s, mv_error *error) {
    const mv_greedy_tokens_args *a = s->args;
    const mv_named ending[] = {named(s, "finished", &a->finished), named(s, "ends", &a->ends),
                               named(s, "pad", &a->pad)};
    const mv_named record[] = {named(s, "history", &a->history), named(s, "counts", &a->counts)};
    const mv_named written[] = {named(s, "out", &a->out), ending[0], record[0], record[1],
                                named(s, "positions", &a->positions)};
    const mv_named read[] = {logits_of(s), ending[1], ending[2]};
    MV_TRY(check_together(ending, 3, error));
    MV_TRY(check_together(record, 2, error));
    MV_TRY(check_ends(s, ending[1], ending[2], error));
    for (size_t w = 0; w < sizeof written / sizeof written[0]; w++) {
        const bool is_flag = written[w].view == &a->finished, has_columns = written[w].view == &a->history;
        MV_TRY(check_of_rows(s, written[w], is_flag ? MV_BOOL : MV_I64, has_columns, error));
    }
    for (size_t w = 0; w < sizeof written / sizeof written[0]; w++) {
        for (size_t r = 0; r < sizeof read / sizeof read[0]; r++)
            MV_TRY(mv_check_apart(written[w], read[r], false, error));
        for (size_t other = 0; other < w; other++) MV_TRY(mv_check_apart(written[w], written[other], false, error));
    }
    return MV_OK;
}

mv_status mv_greedy_tokens(const mv_greedy_tokens_args *a, mv_plan *plan, mv_error *error) {
    shape s = {.op = a->call.op ? a->call.op : "greedy_tokens", .args = a};
    MV_TRY(read_logits(&s, error));
    MV_TRY(check(&s, error));
    const mv_row_view rows_of[] = {
        MV_READS(&a->logits, s.vocabulary, x),
        MV_READS(&a->finished, 1, greedy.finished),
        MV_READS(&a->history, 1, greedy.history),
        MV_READS(&a->counts, 1, greedy.counts),
        MV_READS(&a->positions, 1, greedy.positions),
        {&a->out, 1, offsetof(mv_task, out), .output = "out", .is_index = true},
    };
    mv_task *task = &mv_state(plan)->part[0].task;
    task->greedy = (mv_greedy){.ends = a->ends.data, .pad = a->pad.data};
    if (mv_present(&a->history)) task->greedy.length = a->history.shape[a->history.ndim - 1];
    MV_TRY(mv_start_plan(plan, &mv_greedy_tokens_list, s.op, &a->call, rows_of, sizeof rows_of / sizeof rows_of[0],
                         error));
    return mv_finish_plan(plan, error);
}

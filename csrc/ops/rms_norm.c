/* rms_norm.c: rms_norm, add_rms_norm and norm_add: what they require, and the kernels that serve all three. */
#include "plan.h"

/* ---- the kernels ---------------------------------------------------------------------------------------------- */

#ifdef MV_WITH_CUDA
static const char *decide_by_name(const mv_task *task, double below, mv_decision *decision) {
    (void)task;
    return mv_at_price(decision, HUGE_VAL, below) ? NULL : mv_too_dear;
}
#endif

/*                      name        isa       backend  invariant  decide */
#define RMS_NORM_KERNELS(K)                                                                                            \
    MV_GPU(MV_ALL_DTYPES(K, rms_norm, sm80, sm80, MV_CUDA, true, mv_decide_wide))                                      \
    MV_GPU(MV_ALL_DTYPES(K, rms_norm, naive_sm80, sm80, MV_CUDA, true, decide_by_name))                                \
    MV_X86(MV_ALL_DTYPES(K, rms_norm, avx512, avx512, MV_CPU, true, mv_decide_wide))                                   \
    MV_X86(MV_ALL_DTYPES(K, rms_norm, avx2, avx2, MV_CPU, true, mv_decide_half))                                       \
    MV_ARM64(MV_ALL_DTYPES(K, rms_norm, neon, neon, MV_CPU, true, mv_decide_half))                                     \
    MV_ALL_DTYPES(K, rms_norm, portable, portable, MV_CPU, true, mv_decide_scalar)

RMS_NORM_KERNELS(MV_DECLARE_KERNEL)
static const mv_row rows[] = {RMS_NORM_KERNELS(MV_TABLE_ROW)};
const mv_list mv_rms_norm_list = MV_LIST("rms_norm", rows);

/* ---- the ops -------------------------------------------------------------------------------------------------- */

/* x and residual are the outputs, too: whoever calls an op that works in place gave those no other names. */
static bool in_place(const mv_rms_norm_args *a) {
    return mv_present(&a->out) && mv_present(&a->residual_out) && mv_same_elements(&a->out, &a->x) &&
           mv_same_elements(&a->residual_out, &a->residual);
}

static mv_status check_apart_from_inputs(mv_named out, mv_named x, mv_named residual, mv_named weight,
                                         mv_error *error) {
    MV_TRY(mv_check_apart(out, x, true, error));
    MV_TRY(mv_check_apart(out, residual, true, error));
    return mv_check_apart(out, weight, false, error);
}

static mv_status check(const char *op, const mv_rms_norm_args *a, mv_error *error) {
    const mv_named x = {op, "x", &a->x}, residual = {op, "residual", &a->residual}, weight = {op, "weight", &a->weight};
    const bool same = in_place(a);
    const mv_named out = {op, same ? "x" : "out", &a->out};
    const mv_named residual_out = {op, same ? "residual" : "residual_out", &a->residual_out};
    MV_TRY(mv_check_numbers(op, a->eps, a->weight_offset, a->rounding, error));
    MV_TRY(mv_check_x(x, error));
    const int64_t hidden = a->x.shape[a->x.ndim - 1];
    if (mv_present(&a->residual)) MV_TRY(mv_check_like_x(residual, &a->x, error));
    if (mv_present(&a->weight)) MV_TRY(mv_check_vector(weight, &a->x, hidden, "= x.shape[-1]", error));
    if (mv_present(&a->out)) MV_TRY(mv_check_output(out, &a->x, hidden, error));
    if (mv_present(&a->residual_out)) MV_TRY(mv_check_output(residual_out, &a->x, hidden, error));
    if (mv_present(&a->out)) MV_TRY(check_apart_from_inputs(out, x, residual, weight, error));
    if (!mv_present(&a->residual_out)) return MV_OK;
    MV_TRY(check_apart_from_inputs(residual_out, x, residual, weight, error));
    return mv_check_apart(out, residual_out, false, error);
}

/* Where in a task the residual goes: the norm sees its sum with x, or it is added to what the norm gives. */
enum { BEFORE_NORM = offsetof(mv_task, norm.residual), BEHIND_NORM = offsetof(mv_task, norm.added) };

/* sums: residual_out is an output. */
static mv_status make_plan(const char *op, const mv_rms_norm_args *a, size_t residual_place, bool sums, mv_plan *plan,
                           mv_error *error) {
    MV_TRY(check(op, a, error));
    const int64_t hidden = a->x.shape[a->x.ndim - 1];
    const mv_row_view rows[] = {MV_READS(&a->x, hidden, x),
                                {&a->residual, hidden, residual_place, .output = NULL},
                                {&a->out, hidden, offsetof(mv_task, out), .output = "out"},
                                MV_RESIDUAL_OUT(&a->residual_out, hidden)};
    MV_TRY(mv_start_plan(plan, &mv_rms_norm_list, op, &a->call, rows, sums ? 4 : 3, error));
    mv_task *task = &mv_state(plan)->part[0].task;
    task->norm.weight = a->weight.data;
    task->norm.weight_dtype = mv_present(&a->weight) ? a->weight.dtype : a->x.dtype;
    task->norm.eps = (float)a->eps;
    task->norm.weight_offset = (float)a->weight_offset;
    task->rounding = a->rounding;
    return mv_finish_plan(plan, error);
}

mv_status mv_rms_norm(const mv_rms_norm_args *a, mv_plan *plan, mv_error *error) {
    const char *op = a->call.op ? a->call.op : "rms_norm";
    MV_REQUIRE(!mv_present(&a->residual) && !mv_present(&a->residual_out), MV_BAD_VALUE,
               "%s: a residual was given; mv_add_rms_norm takes one", op);
    return make_plan(op, a, BEFORE_NORM, false, plan, error);
}

mv_status mv_add_rms_norm(const mv_rms_norm_args *a, mv_plan *plan, mv_error *error) {
    const char *op = a->call.op ? a->call.op : "add_rms_norm";
    MV_REQUIRE(mv_present(&a->residual), MV_BAD_VALUE, "%s: residual is missing", op);
    return make_plan(op, a, BEFORE_NORM, true, plan, error);
}

mv_status mv_norm_add(const mv_rms_norm_args *a, mv_plan *plan, mv_error *error) {
    const char *op = a->call.op ? a->call.op : "norm_add";
    MV_REQUIRE(mv_present(&a->residual), MV_BAD_VALUE, "%s: residual is missing", op);
    MV_REQUIRE(!mv_present(&a->residual_out), MV_BAD_VALUE, "%s: a residual_out was given; out is the sum", op);
    return make_plan(op, a, BEHIND_NORM, false, plan, error);
}

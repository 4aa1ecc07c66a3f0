/* act_and_mul.c: silu_and_mul and gelu_and_mul: what they require, and the kernels that serve both. */
#include "plan.h"

/* ---- the kernels ---------------------------------------------------------------------------------------------- */

/*                         name      isa       backend  invariant  decide */
#define ACT_AND_MUL_KERNELS(K)                                                                                         \
    MV_GPU(MV_ALL_DTYPES(K, act_and_mul, sm80, sm80, MV_CUDA, true, mv_decide_wide))                                   \
    MV_X86(MV_ALL_DTYPES(K, act_and_mul, avx512, avx512, MV_CPU, true, mv_decide_wide))                                \
    MV_X86(MV_ALL_DTYPES(K, act_and_mul, avx2, avx2, MV_CPU, true, mv_decide_half))                                    \
    MV_ARM64(MV_ALL_DTYPES(K, act_and_mul, neon, neon, MV_CPU, true, mv_decide_half))                                  \
    MV_ALL_DTYPES(K, act_and_mul, portable, portable, MV_CPU, true, mv_decide_scalar)

ACT_AND_MUL_KERNELS(MV_DECLARE_KERNEL)
static const mv_row rows[] = {ACT_AND_MUL_KERNELS(MV_TABLE_ROW)};
const mv_list mv_act_and_mul_list = MV_LIST("act_and_mul", rows);

/* ---- the ops -------------------------------------------------------------------------------------------------- */

static mv_status check(const char *op, const mv_act_and_mul_args *a, mv_error *error) {
    const mv_named x = {op, "x", &a->x}, out = {op, "out", &a->out};
    MV_TRY(mv_check_rounding(op, a->rounding, error));
    MV_TRY(mv_check_x(x, error));
    const int64_t columns = a->x.shape[a->x.ndim - 1];
    MV_REQUIRE(columns % 2 == 0, MV_BAD_VALUE,
               "%s: x has shape %s, expected an even last dimension (gate | up, as many columns each)", op,
               mv_shape_text(&a->x).text);
    if (mv_present(&a->out)) MV_TRY(mv_check_output(out, &a->x, columns / 2, error));
    return mv_check_apart(out, x, false, error);
}

static mv_status make_plan(const char *op, const mv_act_and_mul_args *a, mv_activation activation, mv_plan *plan,
                           mv_error *error) {
    MV_TRY(check(op, a, error));
    const int64_t hidden = a->x.shape[a->x.ndim - 1] / 2;
    const mv_row_view rows[] = {MV_READS(&a->x, 2 * hidden, x),
                                {&a->out, hidden, offsetof(mv_task, out), .output = "out"}};
    MV_TRY(mv_start_plan(plan, &mv_act_and_mul_list, op, &a->call, rows, 2, error));
    mv_task *task = &mv_state(plan)->part[0].task;
    task->hidden = hidden;
    task->activation = activation;
    task->rounding = a->rounding;
    return mv_finish_plan(plan, error);
}

mv_status mv_silu_and_mul(const mv_act_and_mul_args *a, mv_plan *plan, mv_error *error) {
    return make_plan(a->call.op ? a->call.op : "silu_and_mul", a, MV_SILU, plan, error);
}

mv_status mv_gelu_and_mul(const mv_act_and_mul_args *a, mv_plan *plan, mv_error *error) {
    const char *op = a->call.op ? a->call.op : "gelu_and_mul";
    MV_REQUIRE(a->approximate == MV_APPROXIMATE_TANH || a->approximate == MV_APPROXIMATE_NONE, MV_BAD_VALUE,
               "%s: unknown approximate, expected \"tanh\" or \"none\"", op);
    return make_plan(op, a, a->approximate == MV_APPROXIMATE_TANH ? MV_GELU_TANH : MV_GELU, plan, error);
}

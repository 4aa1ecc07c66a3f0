/* xeon.c: what the kernels with AMX take, in microseconds: see epyc9005.c, beside whose figures these stand. */
#include "cpu/cpu.h"
#include "cpu/linear/outputs.h"
#include "cpu/workspace.h"

const char *mv_prefill_amx_decide(const mv_task *task, double below, mv_decision *decision) {
    if (task->linear.weight_dtype != MV_BF16 || !rows_are_contiguous(task)) /* it leaves those to the others */
        return mv_prefill_avx512bf16_decide(task, below, decision);
    const double products = (double)task->linear.outputs * (double)task->hidden;
    const double us = products * 2 / 3.35e4 + 2 * (double)task->tokens * products / 1e7;
    if (!mv_at_price(decision, us, below)) return mv_too_dear;
    decision->workspace = mv_prefill_workspace(task);
    return NULL;
}

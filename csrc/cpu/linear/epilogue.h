/* epilogue.h: what becomes of the finished sums of a linear layer, once per DTYPE after its vocabulary:
 *
 *   out = rn(sum + bias), or with an addend rn(rn(rn(sum + bias) * scale) + addend)
 *
 * "fp32" makes none of the inner roundings, the others the second only where there is a scale. The outputs of a gated
 * layer are rn(activation(gate) * up), where all but "fp32" round gate, up and the activation, too. */
#ifndef MV_SPAN_BIAS
#define MV_SPAN_BIAS

#include "cpu/activation/activation.h"

/* The bias of n outputs from `row` of the block on; zeros when it has none. */
MV_INLINE vf span_bias(const mv_block *block, int64_t row, int n) {
    if (!block->bias) return v_set(0);
    switch (block->bias_dtype) {
    case MV_F16: return v_load_f16((const element_f16 *)block->bias + row, n);
    case MV_BF16: return v_load_bf16((const element_bf16 *)block->bias + row, n);
    default: return v_load_f32((const element_f32 *)block->bias + row, n);
    }
}
#endif

/* Stores n outputs of a token, from `column` on, whose sums have their biases. Who stores an element reads its addend,
 * and no one else does: out may be the addend. */
MV_INLINE void MV_NAME(store_outputs, DTYPE)(const mv_task *task, int64_t token, int64_t column, vf sum, int n) {
    typedef MV_NAME(element, DTYPE) element;
    const mv_rows addend = task->linear.addend;
    if (addend.data) {
        const element *joins = (const element *)addend.data + mv_row_offset(addend, task->inner, token) + column;
        const bool rounds = mv_rounds_each_step(task->rounding);
        if (rounds) sum = MV_NAME(v_round, DTYPE)(sum);
        if (task->linear.scale != 1) {
            sum = v_mul(sum, v_set(task->linear.scale));
            if (rounds) sum = MV_NAME(v_round, DTYPE)(sum);
        }
        sum = v_add(sum, MV_NAME(v_load, DTYPE)(joins, n));
    }
    element *out = (element *)task->out.data + mv_row_offset(task->out, task->inner, token) + column;
    MV_NAME(v_store, DTYPE)(out, sum, n);
}

/* The same of a gated layer, from the sums of the gate and of up. */
static void MV_NAME(store_gated, DTYPE)(const mv_task *task, int64_t token, int64_t column, vf gate, vf up, int n) {
    typedef MV_NAME(element, DTYPE) element;
    const bool rounds = mv_rounds_each_step(task->rounding);
    if (rounds) gate = MV_NAME(v_round, DTYPE)(gate), up = MV_NAME(v_round, DTYPE)(up);
    vf active = gate;
    switch (task->activation) {
    case MV_SILU: active = v_activation(MV_SILU, gate); break;
    case MV_GELU_TANH: active = v_activation(MV_GELU_TANH, gate); break;
    case MV_GELU: active = v_activation(MV_GELU, gate); break;
    }
    if (rounds) active = MV_NAME(v_round, DTYPE)(active);
    element *out = (element *)task->out.data + mv_row_offset(task->out, task->inner, token) + column;
    MV_NAME(v_store, DTYPE)(out, v_mul(active, up), n);
}

/* What becomes of n outputs of a span from its output r on. gates: of a gated layer, where the gate's sums of these
 * outputs wait for those of up; else NULL. */
MV_INLINE void MV_NAME(finish_outputs, DTYPE)(const mv_task *task, int64_t token, output_span span, int64_t r, vf sum,
                                              int n, float *gates) {
    if (!gates)
        MV_NAME(store_outputs, DTYPE)(task, token, span.column + r, sum, n);
    else if (span.block == task->linear.block)
        v_store_f32(gates, sum, LANES);
    else
        MV_NAME(store_gated, DTYPE)(task, token, span.column + r, v_load_f32(gates, LANES), sum, n);
}

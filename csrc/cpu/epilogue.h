/* epilogue.h: what becomes of the finished sums of a linear layer, once per DTYPE after its vocabulary:
 *
 *   out = rn(sum + bias), or with an addend rn(rn(rn(sum + bias) * scale) + addend)
 *
 * Of the inner roundings "hf" makes both, but the second only where there is a scale, and "fp32" none. */
#ifndef MV_SPAN_BIAS
#define MV_SPAN_BIAS

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
        const bool once = task->rounding == MV_ROUNDING_FP32;
        if (!once) sum = MV_NAME(v_round, DTYPE)(sum);
        if (task->linear.scale != 1) {
            sum = v_mul(sum, v_set(task->linear.scale));
            if (!once) sum = MV_NAME(v_round, DTYPE)(sum);
        }
        sum = v_add(sum, MV_NAME(v_load, DTYPE)(joins, n));
    }
    element *out = (element *)task->out.data + mv_row_offset(task->out, task->inner, token) + column;
    MV_NAME(v_store, DTYPE)(out, sum, n);
}

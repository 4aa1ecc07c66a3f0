/* bias.h: the bias of a projection, once per instruction set after its vocabulary. */
#ifndef MV_BIAS_H
#define MV_BIAS_H

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

/* tokens.h: the part of qk_norm_rope_body.h that knows no dtype: the rows of cos and sin of a token, and its place in
 * the cache. */
#ifndef MV_TOKENS_H
#define MV_TOKENS_H

#include "cpu/simd/isa.h"

enum { PARALLEL_HEADS = PARALLEL_ELEMENTS / 2 };

typedef struct {
    const mv_task *task;
    bool no_memory; /* for a thread's scratch */
} token_work;

/* Its rows are row 0. */
MV_INLINE mv_rotary rotary_of_token(const mv_qk *qk, int64_t inner, int64_t token) {
    mv_rotary rotary = qk->rotary;
    if (!rotary.columns) return rotary;
    const int64_t bytes = (int64_t)mv_dtype_bytes(rotary.dtype);
    rotary.cos = (const char *)qk->cos.data + mv_row_offset(qk->cos, inner, token) * bytes;
    rotary.sin = (const char *)qk->sin.data + mv_row_offset(qk->sin, inner, token) * bytes;
    return rotary;
}

typedef struct {
    bool exists;
    int64_t block, row;
} slot_place;

MV_INLINE slot_place slot_of_token(const mv_qk *qk, int64_t inner, int64_t token) {
    if (!qk->slots.data) return (slot_place){false, 0, 0};
    const int64_t at = mv_row_offset(qk->slots, inner, token);
    const int64_t slot = qk->wide_slots ? ((const int64_t *)qk->slots.data)[at] : ((const int32_t *)qk->slots.data)[at];
    return (slot_place){slot >= 0 && slot / qk->block_rows < qk->blocks, slot / qk->block_rows, slot % qk->block_rows};
}

/* In elements. */
MV_INLINE int64_t offset_in_cache(const mv_cache *cache, slot_place slot, int64_t head) {
    return slot.block * cache->block_stride + slot.row * cache->row_stride + head * cache->head_stride;
}

#endif

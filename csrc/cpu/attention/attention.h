/* attention.h: the part of decode_attention_body.h that knows no dtype: which keys there are, and their softmax in
 * float32. Once per instruction set, after its vocabulary. */
#ifndef MV_ATTENTION_H
#define MV_ATTENTION_H

#include "cpu/simd/exp.h"
#include "cpu/workspace.h"

/* Keys of a tile: their values stay in the nearest cache. Query heads that share it at a time. Accumulators beside each
 * other of each of DOT_TOKENS heads. */
enum { TILE_KEYS = 64, TILE_HEADS = 8, VALUE_VECTORS = 4 };

/* ---- keys ------------------------------------------------------------------------------------------------------- */

MV_INLINE int64_t integer_at(mv_integers integers, int64_t i) {
    return integers.wide ? ((const int64_t *)integers.data)[i * integers.stride]
                         : ((const int32_t *)integers.data)[i * integers.stride];
}

/* Where a position is in the cache: false where there is no page for it. */
MV_INLINE bool find_row(const mv_attention *a, int64_t sequence, int64_t position, int64_t *block, int64_t *row) {
    *row = a->ring ? position % a->rows : position;
    *block = sequence;
    if (!a->block_table) return true;
    *block = a->block_table[sequence * a->table_stride + *row / a->block_rows];
    *row %= a->block_rows;
    return *block >= 0 && *block < a->blocks;
}

MV_INLINE char *row_at(mv_cache cache, int64_t block, int64_t row, int64_t head, size_t bytes) {
    return (char *)cache.data +
           (block * cache.block_stride + row * cache.row_stride + head * cache.head_stride) * (int64_t)bytes;
}

MV_INLINE bool has_all_pages(const mv_attention *a, int64_t sequence, int64_t first, int64_t last) {
    int64_t block, row;
    if (!a->block_table) return true;
    for (int64_t p = first; p <= last; p += a->block_rows - p % a->block_rows)
        if (!find_row(a, sequence, p, &block, &row)) return false;
    return true;
}

MV_INLINE mv_key_span span_of(const mv_attention *a, int64_t sequence, int64_t pieces) {
    const int64_t last = integer_at(a->positions, sequence);
    const int64_t start = a->starts.data ? integer_at(a->starts, sequence) : 0;
    if (last < 0) return (mv_key_span){0, last, 0, 1};
    int64_t first = last - a->window + 1;
    if (first < start) first = start;
    if (first < 0) first = 0;
    if (start > last || (!a->ring && last >= a->rows) || !has_all_pages(a, sequence, first, last))
        return (mv_key_span){first, last, -1, 1};
    const int64_t count = last - first + 1, wanted = least(pieces, (count + MV_PIECE_KEYS - 1) / MV_PIECE_KEYS);
    return (mv_key_span){first, last, count, (count + wanted - 1) / wanted};
}

/* ---- softmax ---------------------------------------------------------------------------------------------------- */

/* A tile of keys, and query heads that attend to it. */
typedef struct {
    const mv_attention_work *all;
    const float *q;           /* [heads]                                                                     */
    float *most, *sums, *out; /* [heads]: of the tiles so far; one head's are all->pieces after the one before */
    int64_t count;            /* of keys */
    const void *keys[TILE_KEYS], *values[TILE_KEYS];
    float scores[TILE_HEADS][TILE_KEYS]; /* then p_j */
    float shrink[TILE_HEADS];            /* what the tile makes of the sums so far */
} key_tile;

MV_INLINE float largest(float a, vf b) {
    float lanes[LANES];
    v_store_f32(lanes, b, LANES);
    for (int i = 0; i < LANES; i++) a = lanes[i] > a ? lanes[i] : a;
    return a;
}

/* exp(a - m). Without a key, or with scores of -infinity alone, m is that, and nothing weighs anything. */
MV_INLINE vf weigh(vf a, float most) { return v_exp(v_add(a, v_set(most == -INFINITY ? 0 : -most))); }
MV_INLINE float weigh_one(float a, float most) {
    float lanes[LANES];
    v_store_f32(lanes, weigh(v_set(a), most), LANES);
    return lanes[0];
}

/* The scores of a head become p_j. */
MV_INLINE void weigh_scores(key_tile *tile, int head) {
    const float cap = tile->all->task->attention.soft_cap;
    float *scores = tile->scores[head], *most = &tile->most[head * tile->all->pieces];
    float *sum = &tile->sums[head * tile->all->pieces];
    if (cap > 0)
        for (int64_t j = 0; j < tile->count; j++) scores[j] = cap * tanhf(scores[j] / cap);
    for (int64_t j = tile->count; j % LANES; j++) scores[j] = -INFINITY;
    vf highest = v_set(*most), added = v_set(0);
    for (int64_t j = 0; j < tile->count; j += LANES) highest = v_max(v_load_f32(scores + j, LANES), highest);
    const float now = largest(*most, highest);
    for (int64_t j = 0; j < tile->count; j += LANES) {
        const vf p = weigh(v_load_f32(scores + j, LANES), now);
        v_store_f32(scores + j, p, LANES);
        added = v_add(added, p);
    }
    tile->shrink[head] = weigh_one(*most, now);
    *sum = *sum * tile->shrink[head] + v_sum(added);
    *most = now;
}

/* A head of a sequence: its pieces, in their order, become the first of them, divided by the sum of p_j. */
MV_INLINE void merge_pieces(const mv_attention_work *a, int64_t head, int64_t pieces) {
    const int64_t first = head * a->pieces;
    float *out = a->out + first * a->padded_dim, most = -INFINITY, sum = 0;
    for (int64_t p = 0; p < pieces; p++) most = a->most[first + p] > most ? a->most[first + p] : most;
    for (int64_t p = 0; p < pieces; p++) {
        const float shrink = weigh_one(a->most[first + p], most);
        sum += shrink * a->sums[first + p];
        for (int64_t i = 0; i < a->padded_dim; i += LANES) {
            const vf part = v_mul(v_load_f32(out + p * a->padded_dim + i, LANES), v_set(shrink));
            v_store_f32(out + i, p == 0 ? part : v_add(v_load_f32(out + i, LANES), part), LANES);
        }
    }
    for (int64_t i = 0; i < a->padded_dim; i += LANES)
        v_store_f32(out + i, v_div(v_load_f32(out + i, LANES), v_set(sum)), LANES);
}

#endif

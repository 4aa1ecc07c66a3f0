/* decode_attention_body.h: mv_decode_attention_<DTYPE>_<ISA>: one new token per sequence against its cache.
 *
 *   s_j = scale q . k_j, or c tanh(s_j / c);  m = max_j s_j;  p_j = exp(s_j - m);  out = sum_j p_j v_j / sum_j p_j
 *
 * Three steps, each shared out among the threads. First every key-value head's queries and new key go through norm and
 * rotary embedding, the queries into the workspace, the key and the value into the cache. Then the keys are attended
 * to, in pieces: a piece reads each key and value once from memory, for all query heads of its key-value head, a tile
 * of keys at a time, and keeps m, sum p_j and sum p_j v_j, which it scales down whenever m grows. At last the pieces
 * of a head are merged in their order.
 *
 * A sequence is cut by the number of its keys alone, so its bits do not depend on what else is in the batch. From the
 * queries to the result all is float32; sums run over a tile, and then over the tiles. */
#include "cpu/attention/attention.h"

#include "cpu/norm/norm_row.h"

#include "cpu/attention/head.h"

#define ELEMENT MV_NAME(element, DTYPE)

/* ---- scores ------------------------------------------------------------------------------------------------------ */

/* LANES columns from i on, or the n of them that are there, of some keys and heads. */
MV_INLINE void MV_NAME(score_step, DTYPE)(const key_tile *tile, int64_t key, int head, int64_t i, int n, int rows,
                                          int heads, vf sum[DOT_ROWS][DOT_TOKENS]) {
    const int64_t stride = tile->all->padded_dim;
    MV_UNROLL
    for (int r = 0; r < rows; r++) {
        const vf k = MV_NAME(v_load, DTYPE)((const ELEMENT *)tile->keys[key + r] + i, n);
        MV_UNROLL
        for (int h = 0; h < heads; h++)
            sum[r][h] = v_fma(k, v_load_f32(tile->q + (head + h) * stride + i, LANES), sum[r][h]);
    }
}

MV_INLINE void MV_NAME(score_keys, DTYPE)(key_tile *tile, int64_t key, int head, int rows, int heads) {
    const int64_t dim = tile->all->task->hidden, whole = dim - dim % LANES;
    const float scale = tile->all->task->attention.scale;
    vf sum[DOT_ROWS][DOT_TOKENS];
    MV_UNROLL
    for (int r = 0; r < rows; r++) {
        MV_UNROLL
        for (int h = 0; h < heads; h++) sum[r][h] = v_set(0);
    }
    for (int64_t i = 0; i < whole; i += LANES) MV_NAME(score_step, DTYPE)(tile, key, head, i, LANES, rows, heads, sum);
    if (whole < dim) MV_NAME(score_step, DTYPE)(tile, key, head, whole, (int)(dim - whole), rows, heads, sum);
    MV_UNROLL
    for (int r = 0; r < rows; r++) {
        MV_UNROLL
        for (int h = 0; h < heads; h++) tile->scores[head + h][key + r] = scale * v_sum(sum[r][h]);
    }
}

MV_INLINE void MV_NAME(score_heads, DTYPE)(key_tile *tile, int head, int heads) {
    int64_t key = 0;
    for (; key + DOT_ROWS <= tile->count; key += DOT_ROWS) MV_NAME(score_keys, DTYPE)(tile, key, head, DOT_ROWS, heads);
    for (; key < tile->count; key++) MV_NAME(score_keys, DTYPE)(tile, key, head, 1, heads);
}

/* ---- values ------------------------------------------------------------------------------------------------------ */

/* So many vectors from column i on, of n columns each. */
MV_INLINE void MV_NAME(add_columns, DTYPE)(const key_tile *tile, int head, int64_t i, int n, int vectors, int heads) {
    const int64_t stride = tile->all->pieces * tile->all->padded_dim;
    vf sum[DOT_TOKENS][VALUE_VECTORS];
    MV_UNROLL
    for (int h = 0; h < heads; h++) {
        MV_UNROLL
        for (int j = 0; j < vectors; j++) sum[h][j] = v_set(0);
    }
    for (int64_t key = 0; key < tile->count; key++) {
        const ELEMENT *values = (const ELEMENT *)tile->values[key] + i;
        MV_UNROLL
        for (int j = 0; j < vectors; j++) {
            const vf v = MV_NAME(v_load, DTYPE)(values + j * LANES, n);
            MV_UNROLL
            for (int h = 0; h < heads; h++) sum[h][j] = v_fma(v_set(tile->scores[head + h][key]), v, sum[h][j]);
        }
    }
    MV_UNROLL
    for (int h = 0; h < heads; h++) {
        const vf shrink = v_set(tile->shrink[head + h]);
        float *out = tile->out + (head + h) * stride + i;
        MV_UNROLL
        for (int j = 0; j < vectors; j++)
            v_store_f32(out + j * LANES, v_fma(v_load_f32(out + j * LANES, LANES), shrink, sum[h][j]), LANES);
    }
}

MV_INLINE void MV_NAME(add_values, DTYPE)(const key_tile *tile, int head, int heads) {
    const int64_t dim = tile->all->task->hidden;
    int64_t i = 0;
    for (; i + VALUE_VECTORS * LANES <= dim; i += VALUE_VECTORS * LANES)
        MV_NAME(add_columns, DTYPE)(tile, head, i, LANES, VALUE_VECTORS, heads);
    for (; i + LANES <= dim; i += LANES) MV_NAME(add_columns, DTYPE)(tile, head, i, LANES, 1, heads);
    if (i < dim) MV_NAME(add_columns, DTYPE)(tile, head, i, (int)(dim - i), 1, heads);
}

/* ---- the steps --------------------------------------------------------------------------------------------------- */

/* A tile joins what the tiles before it made of `heads` heads. */
static void MV_NAME(add_tile, DTYPE)(key_tile *tile, int heads) {
    int h = 0;
    for (; h + DOT_TOKENS <= heads; h += DOT_TOKENS) MV_NAME(score_heads, DTYPE)(tile, h, DOT_TOKENS);
    for (; h < heads; h++) MV_NAME(score_heads, DTYPE)(tile, h, 1);
    for (h = 0; h < heads; h++) weigh_scores(tile, h);
    for (h = 0; h + DOT_TOKENS <= heads; h += DOT_TOKENS) MV_NAME(add_values, DTYPE)(tile, h, DOT_TOKENS);
    for (; h < heads; h++) MV_NAME(add_values, DTYPE)(tile, h, 1);
}

/* The keys of positions [first, end), for all query heads of a key-value head. */
static void MV_NAME(attend_piece, DTYPE)(const mv_attention_work *all, int64_t sequence, int64_t kv_head, int64_t piece,
                                         int64_t first, int64_t end) {
    const mv_attention *a = &all->task->attention;
    const int64_t head = sequence * a->heads + kv_head * all->group, dim = all->padded_dim;
    for (int64_t h = 0; h < all->group; h++) {
        const int64_t at = (head + h) * all->pieces + piece;
        all->most[at] = -INFINITY;
        all->sums[at] = 0;
        memset(all->out + at * dim, 0, (size_t)dim * sizeof(float));
    }
    key_tile tile;
    tile.all = all;
    for (; first < end; first += TILE_KEYS) {
        tile.count = least(TILE_KEYS, end - first);
        for (int64_t j = 0; j < tile.count; j++) {
            int64_t block, row;
            find_row(a, sequence, first + j, &block, &row);
            tile.keys[j] = row_at(a->keys, block, row, kv_head, sizeof(ELEMENT));
            tile.values[j] = row_at(a->values, block, row, kv_head, sizeof(ELEMENT));
        }
        for (int64_t h = 0; h < all->group; h += TILE_HEADS) {
            const int64_t at = (head + h) * all->pieces + piece;
            tile.q = all->q + (head + h) * dim;
            tile.most = all->most + at;
            tile.sums = all->sums + at;
            tile.out = all->out + at * dim;
            MV_NAME(add_tile, DTYPE)(&tile, (int)least(TILE_HEADS, all->group - h));
        }
    }
}

/* For each (sequence, key-value head). */
static void MV_NAME(prepare, DTYPE)(void *context, int64_t begin, int64_t end) {
    const mv_attention_work *all = context;
    const mv_task *task = all->task;
    const mv_attention *a = &task->attention;
    const int64_t dim = task->hidden;
    for (int64_t i = begin; i < end; i++) {
        const int64_t s = i / a->kv_heads, kv_head = i % a->kv_heads;
        if (all->spans[s].count <= 0) continue;
        float *turned = all->spare + 2 * i * all->padded_dim, *key = turned + all->padded_dim;
        for (int64_t h = s * a->heads + kv_head * all->group, last = h + all->group; h < last; h++) {
            const ELEMENT *q = (const ELEMENT *)task->x.data + mv_row_offset(task->x, task->inner, h);
            MV_NAME(prepare_head, DTYPE)
            (q, dim, &a->q_norm, &a->rotary, s, task->rounding, all->q + h * all->padded_dim, turned);
        }
        int64_t block, row;
        find_row(a, s, all->spans[s].last, &block, &row);
        ELEMENT *cached = (ELEMENT *)row_at(a->keys, block, row, kv_head, sizeof(ELEMENT));
        const ELEMENT *k = (const ELEMENT *)a->k.data + mv_row_offset(a->k, a->kv_heads, i);
        const ELEMENT *v = (const ELEMENT *)a->v.data + mv_row_offset(a->v, a->kv_heads, i);
        MV_NAME(prepare_head, DTYPE)(k, dim, &a->k_norm, &a->rotary, s, task->rounding, key, turned);
        for (int64_t c = 0; c < dim; c += LANES)
            MV_NAME(v_store, DTYPE)(cached + c, v_load_f32(key + c, LANES), (int)least(LANES, dim - c));
        memcpy(row_at(a->values, block, row, kv_head, sizeof(ELEMENT)), v, (size_t)dim * sizeof(ELEMENT));
    }
}

/* For each (sequence, key-value head, piece). */
static void MV_NAME(attend, DTYPE)(void *context, int64_t begin, int64_t end) {
    const mv_attention_work *all = context;
    const int64_t kv_heads = all->task->attention.kv_heads;
    for (int64_t i = begin; i < end; i++) {
        const int64_t piece = i % all->pieces, kv_head = i / all->pieces % kv_heads, s = i / all->pieces / kv_heads;
        const mv_key_span *span = &all->spans[s];
        const int64_t first = span->first + piece * span->piece, last = least(first + span->piece - 1, span->last);
        if (span->count > 0 && first <= last) MV_NAME(attend_piece, DTYPE)(all, s, kv_head, piece, first, last + 1);
    }
}

/* For each (sequence, query head). */
static void MV_NAME(merge, DTYPE)(void *context, int64_t begin, int64_t end) {
    const mv_attention_work *all = context;
    const mv_task *task = all->task;
    const int64_t dim = task->hidden, heads = task->attention.heads;
    for (int64_t r = begin; r < end; r++) {
        const mv_key_span *span = &all->spans[r / heads];
        ELEMENT *out = (ELEMENT *)task->out.data + mv_row_offset(task->out, task->inner, r);
        const float *merged = all->out + r * all->pieces * all->padded_dim;
        if (span->count > 0) merge_pieces(all, r, (span->count + span->piece - 1) / span->piece);
        for (int64_t i = 0; i < dim; i += LANES) {
            const int n = (int)least(LANES, dim - i);
            const vf value = span->count > 0 ? v_load_f32(merged + i, LANES) : v_set(span->count < 0 ? NAN : 0);
            MV_NAME(v_store, DTYPE)(out + i, value, n);
        }
    }
}

mv_status MV_NAME(MV_NAME(mv_decode_attention, DTYPE), ISA)(const mv_task *task, const mv_decision *decision,
                                                            mv_error *error) {
    (void)decision, (void)error;
    const mv_attention *a = &task->attention;
    const int64_t sequences = task->tokens / a->heads, dim = task->hidden;
    mv_attention_work all;
    mv_attention_workspace(task, &all);
    int64_t most_keys = 1;
    for (int64_t s = 0; s < sequences; s++) {
        all.spans[s] = span_of(a, s, all.pieces);
        if (all.spans[s].piece > most_keys) most_keys = all.spans[s].piece;
    }
    const int64_t pairs = sequences * a->kv_heads;
    mv_parallel_for(pairs, 1 + PARALLEL_ELEMENTS / (dim * all.group), MV_NAME(prepare, DTYPE), &all);
    mv_parallel_for(pairs * all.pieces, 1 + PARALLEL_PRODUCTS / (2 * dim * all.group * most_keys),
                    MV_NAME(attend, DTYPE), &all);
    mv_parallel_for(task->tokens, 1 + PARALLEL_ELEMENTS / (dim * all.pieces), MV_NAME(merge, DTYPE), &all);
    return MV_OK;
}

#undef ELEMENT

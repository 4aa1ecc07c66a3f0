/* prefill_body.h: mv_linear_<DTYPE>_prefill_<ISA>: any number of tokens, bound by arithmetic.
 *
 * The lanes run over tokens. CHUNK_TOKENS tokens at a time: their row factors, then y as a panel of units [k][tokens],
 * then the product, output rows shared out among the threads. There a weight is one broadcast, straight from the
 * row-major matrix: nothing is packed, and no weight is copied unless it has to become a float32 first, or lies the
 * other way round, or a block at an edge is not full. Those are staged, STRIPE outputs by BLOCK_UNITS units, and serve
 * all tokens of the chunk.
 *
 * One lane of one accumulator holds one (token, output) and sums SUM_UNITS units, or a block, in the order of k; those
 * sums are added in the order of k, and those of RUN_UNITS units in double. So its bits depend on hidden, the dtypes
 * and the instruction set alone: the same for 1 token and for 10,000. Blocks of BLOCK_UNITS units keep the panel in the
 * cache.
 *
 * On one Zen 5 core, 128 tokens at 4096 -> 6144: bfloat16 pairs 15.3 ms (420 GFLOP/s, some 80 % of what the core can
 * issue), float32 31 ms (207 GFLOP/s). Blocks of 128 or 512 units instead of 256: within 4 %. Prefetching the next
 * block of weights by hand: nothing at 128 tokens and a third slower at 1 where they are read in place; a quarter
 * faster, and kept, where they are staged.
 */
#ifdef TILES_OF_AMX
#include "cpu/linear/tile_amx.h"
#else
#include "cpu/linear/tile.h"
#endif

#define ELEMENT MV_NAME(element, DTYPE)
#define STEP (LANES * UNIT)

typedef struct {
    const mv_task *task;
    int64_t first, tokens; /* of the chunk */
    int64_t units;         /* of a row */
    float *scale;          /* [tokens] */
    float *panel;          /* per group of TILE_VECTORS vectors of tokens: [units][tokens of the group] */
    bool no_memory;        /* a thread could not have its scratch */
} MV_NAME(chunk, DTYPE);

static void MV_NAME(chunk_scale, DTYPE)(void *context, int64_t begin, int64_t end) {
    const MV_NAME(chunk, DTYPE) *chunk = context;
    for (int64_t t = begin; t < end; t++)
        chunk->scale[t] = MV_NAME(row_scale, DTYPE)(chunk->task, MV_NAME(row_of, DTYPE)(chunk->task, chunk->first + t));
}

/* Steps [begin, end) of STEP columns each. A step of LANES tokens is normalised row by row and turned in registers. */
static void MV_NAME(chunk_panel, DTYPE)(void *context, int64_t begin, int64_t end) {
    const MV_NAME(chunk, DTYPE) *chunk = context;
    const int64_t padded = round_up(chunk->tokens, LANES);
    for (int64_t t = 0; t < chunk->tokens; t += LANES) {
        const token_group group = group_of(t, padded, chunk->units, chunk->panel);
        MV_NAME(row, DTYPE) rows[LANES];
        const int64_t present = least(LANES, chunk->tokens - t);
        for (int64_t i = 0; i < present; i++) {
            const MV_NAME(row, DTYPE) row = MV_NAME(row_of, DTYPE)(chunk->task, chunk->first + t + i);
            rows[i] = MV_NAME(row_after_scale, DTYPE)(row);
        }
        for (int64_t step = begin; step < end; step++) {
            vf m[LANES];
            for (int64_t i = 0; i < LANES; i++)
                m[i] = i < present ? MV_NAME(norm_units, DTYPE)(chunk->task, rows[i], chunk->scale[t + i], step * STEP)
                                   : v_set(0);
            v_transpose(m);
            for (int64_t i = 0; i < LANES; i++)
                v_store_f32(group.panel + (step * LANES + i) * group.width + t % GROUP_TOKENS, m[i], LANES);
        }
    }
}

/* A block of weights, k from element `from` on, as units in `stage`. */
static tile_weights MV_NAME(stage_block, DTYPE)(const mv_task *task, output_span span, int64_t from, int64_t count,
                                                float *stage) {
    const mv_block *block = span.block;
    const bool wide = task->linear.weight_dtype == MV_F32;
    const size_t bytes = mv_dtype_bytes(task->linear.weight_dtype);
    const char *weight = (const char *)block->weight;
    if (block->col_stride == 1) {
        for (int64_t r = 0; r < span.count; r++) {
            const char *row = weight + ((span.row + r) * block->row_stride + from) * (int64_t)bytes;
            for (int64_t k = 0; k < count; k += STEP) {
                const int n = (int)least(STEP, count - k);
                __builtin_prefetch(row + (k + BLOCK_UNITS) * (int64_t)bytes);
                v_store_f32(stage + r * BLOCK_UNITS + k / UNIT, MV_NAME(weight_units, DTYPE)(wide, row, k, n), LANES);
            }
        }
        const int64_t absent = round_up(span.count, TILE_OUTPUTS) - span.count;
        memset(stage + span.count * BLOCK_UNITS, 0, sizeof(float) * (size_t)(absent * BLOCK_UNITS));
        return (tile_weights){(const char *)stage, BLOCK_UNITS * sizeof(float), sizeof(float)};
    }
    for (int64_t k = 0; k < count; k += UNIT)
        for (int64_t r = 0; r < STRIPE; r += LANES) {
            const int64_t n = least(LANES, span.count - r);
            const int present = (int)least(UNIT, count - k);
            vf units = v_set(0);
            if (n > 0) {
                const char *corner =
                    weight + ((span.row + r) * block->row_stride + (from + k) * block->col_stride) * (int64_t)bytes;
                float gathered[UNIT][LANES];
                if (block->row_stride == 1) {
                    units = MV_NAME(weight_column, DTYPE)(wide, corner, 0, block->col_stride, present, (int)n);
                } else {
                    for (int u = 0; u < present; u++)
                        for (int64_t i = 0; i < n; i++)
                            memcpy((char *)gathered[u] + i * (int64_t)bytes,
                                   corner + (i * block->row_stride + u * block->col_stride) * (int64_t)bytes, bytes);
                    units = MV_NAME(weight_column, DTYPE)(wide, gathered, 0, (int64_t)(sizeof gathered[0] / bytes),
                                                          present, (int)n);
                }
            }
            v_store_f32(stage + k / UNIT * STRIPE + r, units, LANES);
        }
    return (tile_weights){(const char *)stage, sizeof(float), STRIPE * sizeof(float)};
}

/* All tokens of the chunk for one span of at most STRIPE outputs. */
static void MV_NAME(chunk_stripe, DTYPE)(const MV_NAME(chunk, DTYPE) * chunk, output_span span,
                                         stripe_scratch *scratch) {
    float *sum = scratch->sum;
    const mv_task *task = chunk->task;
    const mv_block *block = span.block;
    const int64_t padded = round_up(chunk->tokens, LANES), rows = round_up(span.count, TILE_OUTPUTS);
    const int64_t bytes = (int64_t)mv_dtype_bytes(task->linear.weight_dtype);
    const bool in_place =
        MV_NAME(weight_is_unit, DTYPE)(task) && block->col_stride == 1 && span.count % TILE_OUTPUTS == 0;
    for (int64_t r = 0; r < rows; r++) memset(sum + r * CHUNK_TOKENS, 0, sizeof(float) * (size_t)padded);

    const int64_t run = RUN_UNITS * UNIT;
    for (int64_t k = 0; k < task->hidden; k += BLOCK_UNITS * UNIT) {
        if (k > 0 && k % run == 0) finish_run(scratch, rows, padded, k == run, false);
        const int64_t count = least(BLOCK_UNITS * UNIT, task->hidden - k), units = (count + UNIT - 1) / UNIT;
        tile_weights weights = {(const char *)block->weight + (span.row * block->row_stride + k) * bytes,
                                block->row_stride * bytes, sizeof(float)};
        if (!in_place || count % (READ_UNITS * UNIT) != 0)
            weights = MV_NAME(stage_block, DTYPE)(task, span, k, count, scratch->stage);
        MV_NAME(multiply_block, DTYPE)(chunk->panel, chunk->units, k / UNIT, padded, weights, units, sum, rows);
    }
    if (task->hidden > run) finish_run(scratch, rows, padded, false, true);
#if UNIT > 1
    for (int64_t r = 0; r < span.count; r++)
        for (int64_t t = 0; t < chunk->tokens; t++) {
            if (t % LANES == 0 && !v_any_nan(v_load_f32(sum + r * CHUNK_TOKENS + t, LANES))) {
                t += LANES - 1;
                continue;
            }
            const token_group group = group_of(t, padded, chunk->units, chunk->panel);
            float *to = sum + r * CHUNK_TOKENS + t;
            *to = MV_NAME(settle, DTYPE)(*to, task, block, span.row + r, group.panel + t % GROUP_TOKENS, group.width);
        }
#endif

    for (int64_t t = 0; t < chunk->tokens; t += LANES)
        for (int64_t r = 0; r < span.count; r += LANES) {
            const int n = (int)least(LANES, span.count - r);
            const vf bias = span_bias(block, span.row + r, n);
            vf m[LANES];
            for (int i = 0; i < LANES; i++)
                m[i] = i < n ? v_load_f32(sum + (r + i) * CHUNK_TOKENS + t, LANES) : v_set(0);
            v_transpose(m);
            for (int64_t i = 0; i < least(LANES, chunk->tokens - t); i++) {
                float *gates = task->linear.gated ? scratch->gates + (t + i) * STRIPE + r : NULL;
                MV_NAME(finish_outputs, DTYPE)(task, chunk->first + t + i, span, r, v_add(m[i], bias), n, gates);
            }
        }
}

/* Tiles [begin, end) of TILE_OUTPUTS outputs each. */
static void MV_NAME(chunk_outputs, DTYPE)(void *context, int64_t begin, int64_t end) {
    MV_NAME(chunk, DTYPE) *chunk = context;
    stripe_scratch *scratch = mv_thread_scratch(sizeof *scratch);
    if (!scratch) {
        __atomic_store_n(&chunk->no_memory, true, __ATOMIC_RELAXED);
        return;
    }
    int64_t column = begin * TILE_OUTPUTS;
    const int64_t last = least(end * TILE_OUTPUTS, out_columns(chunk->task));
    MV_NAME(begin_tiles, DTYPE)();
    while (column < last) {
        const output_span span = next_span(chunk->task, &column, least(last, column + STRIPE));
        MV_NAME(chunk_stripe, DTYPE)(chunk, span, scratch);
        if (chunk->task->linear.gated) MV_NAME(chunk_stripe, DTYPE)(chunk, up_span(chunk->task, span), scratch);
    }
    MV_NAME(end_tiles, DTYPE)();
}

mv_status MV_NAME(MV_NAME(MV_NAME(mv_linear, DTYPE), prefill), ISA)(const mv_task *task, const mv_decision *decision,
                                                                    mv_error *error) {
#if UNIT == 2
    if (task->linear.weight_dtype == MV_F32) return mv_linear_bf16_prefill_avx512(task, decision, error);
#endif
#ifdef TILES_OF_AMX
    if (!rows_are_contiguous(task)) return mv_linear_bf16_prefill_avx512bf16(task, decision, error);
#endif
    (void)decision;
    const int64_t hidden = task->hidden, tiles = (out_columns(task) + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
    float *scale = task->workspace;
    MV_NAME(chunk, DTYPE) chunk = {task, 0, 0, padded_units(hidden) / UNIT, scale, scale + CHUNK_TOKENS, false};
    for (; chunk.first < task->tokens; chunk.first += CHUNK_TOKENS) {
        chunk.tokens = least(CHUNK_TOKENS, task->tokens - chunk.first);
        mv_parallel_for(chunk.tokens, 1 + PARALLEL_ELEMENTS / hidden, MV_NAME(chunk_scale, DTYPE), &chunk);
        mv_parallel_for((hidden + STEP - 1) / STEP, 1 + PARALLEL_ELEMENTS / (chunk.tokens * STEP),
                        MV_NAME(chunk_panel, DTYPE), &chunk);
        mv_parallel_for(tiles, 1 + PARALLEL_PRODUCTS / (hidden * TILE_OUTPUTS * round_up(chunk.tokens, LANES)),
                        MV_NAME(chunk_outputs, DTYPE), &chunk);
        if (chunk.no_memory)
            return mv_fail(error, MV_NO_MEMORY, "%s: no memory for the %zu bytes that each thread works in", task->op,
                           sizeof(stripe_scratch));
    }
    return MV_OK;
}

#undef ELEMENT
#undef STEP

/* outputs.h: the outputs of a projection as one range, though q, k and v may be three matrices. */
#ifndef MV_OUTPUTS_H
#define MV_OUTPUTS_H

#include "cpu/simd/isa.h"

/* Some consecutive outputs of one block. */
typedef struct {
    const mv_block *block;
    int64_t row; /* of the block's weight: its first output */
    int64_t count;
    int64_t column; /* of `out` */
} output_span;

/* Of out: half of the outputs of a gated layer. */
MV_INLINE int64_t out_columns(const mv_task *task) {
    return task->linear.gated ? task->linear.outputs / 2 : task->linear.outputs;
}

/* The part of the outputs [*column, end) that the block at *column has; moves *column past it. Of a gated layer
 * a column is an output of the gate. */
MV_INLINE output_span next_span(const mv_task *task, int64_t *column, int64_t end) {
    int64_t before = 0;
    int b = 0;
    if (!task->linear.packed)
        for (; *column >= before + task->linear.block[b].outputs; b++) before += task->linear.block[b].outputs;
    const int64_t block_end = task->linear.packed ? task->linear.outputs : before + task->linear.block[b].outputs;
    const output_span span = {&task->linear.block[b], *column - before, least(end, block_end) - *column, *column};
    *column += span.count;
    return span;
}

/* Of a gated layer the spans are the gate's. This is up's of the same columns. */
MV_INLINE output_span up_span(const mv_task *task, output_span gate) {
    gate.block = &task->linear.block[1];
    return gate;
}

/* Tokens that a kernel normalises before it multiplies: enough that reading the weights again for the next ones is
 * lost in the arithmetic, and few enough that y stays in the cache. */
enum { CHUNK_TOKENS = 128 };

/* Units that a lane adds up before its sum joins a total: results of float32 are worth a second level early, those of
 * 16 bits are rounded by more than a sum of this length errs. */
#define SUM_UNITS(element) (sizeof(element) == sizeof(float) ? (int64_t)64 : (int64_t)2048)

/* Every block's weights are contiguous along hidden. */
MV_INLINE bool rows_are_contiguous(const mv_task *task) {
    for (int b = 0; b < (task->linear.packed ? 1 : 3); b++)
        if (task->linear.block[b].outputs > 0 && task->linear.block[b].col_stride != 1) return false;
    return true;
}

/* Columns of a row of y with the zeros after it, so that whole vectors may be read and written. */
MV_INLINE int64_t padded_units(int64_t hidden) { return round_up(hidden, 64); }

#endif

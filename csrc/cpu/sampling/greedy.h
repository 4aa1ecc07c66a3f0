/* greedy.h: the part of greedy_tokens_body.h that knows no dtype: which of two logits counts, and what follows the
 * choice. */
#ifndef MV_GREEDY_H
#define MV_GREEDY_H

#include "cpu/simd/isa.h"

/* Logits that are looked at together: a multiple of two vectors of any width. */
enum { STRETCH = 512 };

/* Does a logit take the place of the largest one in front of it? Of equal ones the first counts, also of NaN. */
MV_INLINE bool exceeds(float logit, float most) { return logit > most || (isnan(logit) && !isnan(most)); }

MV_INLINE int64_t *integer_of_row(mv_rows rows, int64_t inner, int64_t row) {
    return (int64_t *)rows.data + mv_row_offset(rows, inner, row);
}

/* The token of a row, whose largest logit is that one, and what follows from it. */
static inline void choose_token(const mv_task *task, int64_t row, int64_t largest) {
    const mv_greedy *greedy = &task->greedy;
    const int64_t inner = task->inner;
    int64_t token = largest;
    if (greedy->finished.data) {
        uint8_t *finished = (uint8_t *)greedy->finished.data + mv_row_offset(greedy->finished, inner, row);
        if (*finished)
            token = *greedy->pad;
        else
            *finished = ((const uint8_t *)greedy->ends)[token] != 0;
    }
    *integer_of_row(task->out, inner, row) = token;
    if (greedy->counts.data) {
        int64_t *count = integer_of_row(greedy->counts, inner, row);
        if (*count >= 0 && *count < greedy->length) integer_of_row(greedy->history, inner, row)[*count] = token;
        *count = (int64_t)((uint64_t)*count + 1);
    }
    if (greedy->positions.data) {
        int64_t *position = integer_of_row(greedy->positions, inner, row);
        *position = (int64_t)((uint64_t)*position + 1);
    }
}

#endif

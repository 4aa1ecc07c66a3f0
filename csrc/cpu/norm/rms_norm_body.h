/* rms_norm_body.h: mv_rms_norm_<DTYPE>_<ISA>: rms_norm, and with a residual add_rms_norm or norm_add, one row after
 * another.
 *
 * A row is read twice and written once; the second read comes from the nearest cache, as long as the row fits there.
 * Outputs may lie exactly on x or residual: every element is read before its place is written, and s is read back
 * from residual_out, which nothing else overlaps.
 */
#include "cpu/norm/norm_row.h"

#define ELEMENT MV_NAME(element, DTYPE)

/* n <= LANES columns from i on. adds: norm_add, whose residual joins what the norm gives. */
MV_INLINE void MV_NAME(norm_columns, DTYPE)(const mv_task *task, MV_NAME(row, DTYPE) row, float scale,
                                            const ELEMENT *joins, ELEMENT *out, int64_t i, int n, bool adds) {
    const vf s = MV_NAME(row_load, DTYPE)(row, i, n), weight = MV_NAME(row_weight, DTYPE)(task, i, n);
    vf y = MV_NAME(row_norm, DTYPE)(task, s, scale, weight);
    if (adds) y = v_add(y, MV_NAME(v_load, DTYPE)(joins + i, n));
    MV_NAME(v_store, DTYPE)(out + i, y, n);
}

MV_INLINE void MV_NAME(norm_token, DTYPE)(const mv_task *task, int64_t token, bool adds) {
    const int64_t hidden = task->hidden;
    const mv_rows added = task->norm.added;
    ELEMENT *out = (ELEMENT *)task->out.data + mv_row_offset(task->out, task->inner, token);
    const ELEMENT *joins = adds ? (const ELEMENT *)added.data + mv_row_offset(added, task->inner, token) : NULL;
    MV_NAME(row, DTYPE) row = MV_NAME(row_of, DTYPE)(task, token);
    const float scale = MV_NAME(row_scale, DTYPE)(task, row);
    row = MV_NAME(row_after_scale, DTYPE)(row);
    int64_t i = 0;
    for (; i + LANES <= hidden; i += LANES) MV_NAME(norm_columns, DTYPE)(task, row, scale, joins, out, i, LANES, adds);
    if (i < hidden) MV_NAME(norm_columns, DTYPE)(task, row, scale, joins, out, i, (int)(hidden - i), adds);
}

static void MV_NAME(norm_rows, DTYPE)(void *context, int64_t begin, int64_t end) {
    const mv_task *task = context;
    for (int64_t token = begin; token < end; token++) {
        if (task->norm.added.data)
            MV_NAME(norm_token, DTYPE)(task, token, true);
        else
            MV_NAME(norm_token, DTYPE)(task, token, false);
    }
}

mv_status MV_NAME(MV_NAME(mv_rms_norm, DTYPE), ISA)(const mv_task *task, const mv_decision *decision, mv_error *error) {
    (void)decision, (void)error;
    mv_parallel_for(task->tokens, 1 + PARALLEL_ELEMENTS / task->hidden, MV_NAME(norm_rows, DTYPE), (void *)task);
    return MV_OK;
}

#undef ELEMENT

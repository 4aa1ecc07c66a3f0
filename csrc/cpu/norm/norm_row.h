/* norm_row.h: the norm of one row, shared by every CPU kernel; included once per DTYPE after a vocabulary.
 *
 *   s = x, or rn(x + residual)       row_load
 *   r = 1 / sqrt(mean(s^2) + eps)    row_scale, which also leaves s in residual_out
 *   y = s * r * (offset + weight)    row_norm, from s, r and the weight
 *
 * A linear layer that takes x as it is has r = 1 and weights of 1: then y is x.
 *
 * Sums run in four vectors over the columns from 0, whatever the alignment, and are added in one order: the bits of a
 * row depend on its values, hidden and the instruction set alone. Four, because an add waits four cycles for the one
 * before it, and because shorter sums err less. A row of more than RUN_COLUMNS is summed in such runs, and their sums
 * in double: one more square is nothing to a float32 that already holds 2^24 of them.
 */
typedef MV_NAME(element, DTYPE) MV_NAME(row_element, DTYPE);
#define ROW_ELEMENT MV_NAME(row_element, DTYPE)

/* One token's row of s; where it may be read again after row_scale. */
typedef struct {
    const ROW_ELEMENT *x, *residual;
    ROW_ELEMENT *residual_out;
} MV_NAME(row, DTYPE);
#define ROW MV_NAME(row, DTYPE)

MV_INLINE ROW MV_NAME(row_of, DTYPE)(const mv_task *task, int64_t token) {
    const mv_rows x = task->x, residual = task->norm.residual, residual_out = task->norm.residual_out;
    ROW row = {(const ROW_ELEMENT *)x.data + mv_row_offset(x, task->inner, token), NULL, NULL};
    if (residual.data) row.residual = (const ROW_ELEMENT *)residual.data + mv_row_offset(residual, task->inner, token);
    if (residual_out.data)
        row.residual_out = (ROW_ELEMENT *)residual_out.data + mv_row_offset(residual_out, task->inner, token);
    return row;
}

MV_INLINE vf MV_NAME(row_load, DTYPE)(ROW row, int64_t i, int n) {
    const vf x = MV_NAME(v_load, DTYPE)(row.x + i, n);
    if (!row.residual) return x;
    return MV_NAME(v_round, DTYPE)(v_add(x, MV_NAME(v_load, DTYPE)(row.residual + i, n)));
}

/* s stands in residual_out now, and x or residual may have been overwritten by it. */
MV_INLINE ROW MV_NAME(row_after_scale, DTYPE)(ROW row) {
    if (row.residual_out) row = (ROW){row.residual_out, NULL, NULL};
    return row;
}

MV_INLINE vf MV_NAME(row_square, DTYPE)(ROW row, int64_t i, int n, vf sum) {
    const vf s = MV_NAME(row_load, DTYPE)(row, i, n);
    if (row.residual_out) MV_NAME(v_store, DTYPE)(row.residual_out + i, s, n);
    return v_fma(s, s, sum);
}

/* The sum of the squares of the columns [i, end). */
MV_INLINE float MV_NAME(row_squares, DTYPE)(ROW row, int64_t i, int64_t end) {
    vf sum[4] = {v_set(0), v_set(0), v_set(0), v_set(0)};
    for (; i + 4 * LANES <= end; i += 4 * LANES) {
        MV_UNROLL
        for (int j = 0; j < 4; j++) sum[j] = MV_NAME(row_square, DTYPE)(row, i + j * LANES, LANES, sum[j]);
    }
    for (; i + LANES <= end; i += LANES) sum[0] = MV_NAME(row_square, DTYPE)(row, i, LANES, sum[0]);
    if (i < end) sum[1] = MV_NAME(row_square, DTYPE)(row, i, (int)(end - i), sum[1]);
    return v_sum(v_add(v_add(sum[0], sum[1]), v_add(sum[2], sum[3])));
}

MV_INLINE float MV_NAME(row_factor, DTYPE)(ROW row, int64_t hidden, float eps) {
    double squares = 0;
    for (int64_t i = 0; i < hidden; i += RUN_COLUMNS)
        squares += (double)MV_NAME(row_squares, DTYPE)(row, i, least(i + RUN_COLUMNS, hidden));
    /* rounded once: its error is that of the whole row */
    return (float)(1 / sqrt(squares / (double)hidden + (double)eps));
}

static __attribute__((unused)) float MV_NAME(row_scale, DTYPE)(const mv_task *task, ROW row) {
    if (task->linear.plain_x) return 1;
    return MV_NAME(row_factor, DTYPE)(row, task->hidden, task->norm.eps);
}

/* The norm weight, in x's dtype or float32. */
MV_INLINE vf MV_NAME(row_weight, DTYPE)(const mv_task *task, int64_t i, int n) {
    const vf weight = !task->norm.weight ? v_set(1)
                      : task->norm.weight_dtype == MV_F32
                          ? v_load_f32((const element_f32 *)task->norm.weight + i, n)
                          : MV_NAME(v_load, DTYPE)((const ROW_ELEMENT *)task->norm.weight + i, n);
    return v_add(v_set(task->norm.weight_offset), weight);
}

/* In "hf" rounded twice, in "hf_once" once; in "fp32" not at all, the caller rounds where it must. */
MV_INLINE vf MV_NAME(row_norm, DTYPE)(const mv_task *task, vf s, float scale, vf weight) {
    const vf normal = v_mul(s, v_set(scale));
    if (mv_norm_rounds_twice(task->rounding))
        return MV_NAME(v_round, DTYPE)(v_mul(MV_NAME(v_round, DTYPE)(normal), weight));
    const vf y = v_mul(normal, weight);
    return mv_rounds_each_step(task->rounding) ? MV_NAME(v_round, DTYPE)(y) : y;
}

#undef ROW
#undef ROW_ELEMENT

/* rms_norm_qkv_decode_body.h: mv_rms_norm_qkv_<DTYPE>_decode_<ISA>: a few tokens, bound by reading the weights.
 *
 * First y of every token goes into the workspace, as the units that the products take; it is small and stays in the
 * nearest cache. Then the threads share out the rows of the weights. DOT_ROWS rows are read side by side, each once
 * from memory, and multiplied with y of DOT_TOKENS tokens at a time, one accumulator for each pair; more tokens take
 * further passes over the same rows, which are in the cache by then.
 *
 * A result depends on hidden, the dtypes and the number of tokens, never on the number of threads. Weights that are
 * not contiguous along hidden go to the prefill kernel.
 */
#define ELEMENT MV_NAME(element, DTYPE)
#define STEP (LANES * UNIT)

typedef struct {
    const mv_task *task;
    float *y; /* [tokens][units] */
    int64_t units;
} MV_NAME(decode, DTYPE);

static void MV_NAME(decode_norm, DTYPE)(void *context, int64_t begin, int64_t end) {
    const MV_NAME(decode, DTYPE) *decode = context;
    const mv_task *task = decode->task;
    for (int64_t token = begin; token < end; token++) {
        MV_NAME(row, DTYPE) row = MV_NAME(row_of, DTYPE)(task, token);
        float *y = decode->y + token * decode->units;
        const float scale = MV_NAME(row_scale, DTYPE)(task, row);
        row = MV_NAME(row_after_scale, DTYPE)(row);
        for (int64_t i = 0; i < task->hidden; i += STEP)
            v_store_f32(y + i / UNIT, MV_NAME(norm_units, DTYPE)(task, row, scale, i), LANES);
    }
}

/* `rows` rows of a block from span.row + r on, with `tokens` tokens from `token` on. */
MV_INLINE void MV_NAME(decode_tile, DTYPE)(const MV_NAME(decode, DTYPE) *decode, output_span span, int64_t r,
                                           int64_t token, bool wide, int rows, int tokens) {
    const mv_task *task = decode->task;
    const size_t element_bytes = wide ? sizeof(float) : sizeof(ELEMENT);
    const int64_t hidden = task->hidden, row_bytes = span.block->row_stride * (int64_t)element_bytes;
    const char *weight = (const char *)span.block->weight + (span.row + r) * row_bytes;
    const float *y = decode->y + token * decode->units;
    vf sum[DOT_ROWS][DOT_TOKENS];
    MV_UNROLL
    for (int i = 0; i < rows; i++)
        MV_UNROLL
        for (int t = 0; t < tokens; t++)
            sum[i][t] = v_set(0);

    int64_t k = 0;
    for (; k + STEP <= hidden; k += STEP)
        MV_UNROLL
        for (int i = 0; i < rows; i++) {
            const vf w = MV_NAME(weight_units, DTYPE)(wide, weight + i * row_bytes, k, STEP);
            MV_UNROLL
            for (int t = 0; t < tokens; t++)
                sum[i][t] = MV_NAME(v_mac, DTYPE)(w, v_load_f32(y + t * decode->units + k / UNIT, LANES), sum[i][t]);
        }
    if (k < hidden)
        MV_UNROLL
        for (int i = 0; i < rows; i++) {
            const vf w = MV_NAME(weight_units, DTYPE)(wide, weight + i * row_bytes, k, (int)(hidden - k));
            MV_UNROLL
            for (int t = 0; t < tokens; t++)
                sum[i][t] = MV_NAME(v_mac, DTYPE)(w, v_load_f32(y + t * decode->units + k / UNIT, LANES), sum[i][t]);
        }

    for (int t = 0; t < tokens; t++) {
        ELEMENT *out = (ELEMENT *)task->out.data + mv_row_offset(task->out, task->inner, token + t) + span.column + r;
        for (int i = 0; i < rows; i++)
            MV_NAME(v_store, DTYPE)(out + i, v_add(v_set(v_sum(sum[i][t])), span_bias(span.block, span.row + r + i, 1)), 1);
    }
}

MV_INLINE void MV_NAME(decode_span, DTYPE)(const MV_NAME(decode, DTYPE) *decode, output_span span, bool wide) {
    const int64_t tokens = decode->task->tokens;
    int64_t r = 0;
    for (; r + DOT_ROWS <= span.count; r += DOT_ROWS) {
        int64_t token = 0;
        for (; token + DOT_TOKENS <= tokens; token += DOT_TOKENS)
            MV_NAME(decode_tile, DTYPE)(decode, span, r, token, wide, DOT_ROWS, DOT_TOKENS);
        for (; token < tokens; token++)
            MV_NAME(decode_tile, DTYPE)(decode, span, r, token, wide, DOT_ROWS, 1);
    }
    for (; r < span.count; r++)
        for (int64_t token = 0; token < tokens; token++)
            MV_NAME(decode_tile, DTYPE)(decode, span, r, token, wide, 1, 1);
}

static void MV_NAME(decode_outputs, DTYPE)(void *context, int64_t begin, int64_t end) {
    const MV_NAME(decode, DTYPE) *decode = context;
    while (begin < end) {
        const output_span span = next_span(decode->task, &begin, end);
        if (decode->task->weight_dtype == MV_F32)
            MV_NAME(decode_span, DTYPE)(decode, span, true);
        else
            MV_NAME(decode_span, DTYPE)(decode, span, false);
    }
}

mv_status MV_NAME(MV_NAME(MV_NAME(mv_rms_norm_qkv, DTYPE), decode), ISA)(const mv_task *task, mv_error *error) {
#if UNIT == 2
    if (task->weight_dtype == MV_F32)
        return mv_rms_norm_qkv_bf16_decode_avx512(task, error);
#endif
    if (!rows_are_contiguous(task))
        return MV_NAME(MV_NAME(MV_NAME(mv_rms_norm_qkv, DTYPE), prefill), ISA)(task, error);
    MV_NAME(decode, DTYPE) decode = {task, task->workspace, padded_units(task->hidden) / UNIT};
    mv_parallel_for(task->tokens, 1 + PARALLEL_ELEMENTS / task->hidden, MV_NAME(decode_norm, DTYPE), &decode);
    const int64_t rows_worth_a_thread = PARALLEL_PRODUCTS / (task->hidden * task->tokens + 1);
    mv_parallel_for(task->outputs, round_up(rows_worth_a_thread + 1, DOT_ROWS), MV_NAME(decode_outputs, DTYPE),
                    &decode);
    return MV_OK;
}

#undef ELEMENT
#undef STEP

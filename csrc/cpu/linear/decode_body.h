/* decode_body.h: mv_linear_<DTYPE>_decode_<ISA>: a few tokens, bound by reading the weights.
 *
 * First y of every token goes into the workspace, as the units that the products take; it is small and stays in the
 * nearest cache. Then the threads share out the rows of the weights. DOT_ROWS rows are read side by side, each once
 * from memory, and multiplied with y of DOT_TOKENS tokens at a time, one accumulator for each pair; more tokens take
 * further passes over the same rows, which are in the cache by then. Any number of tokens works, a chunk at a time.
 *
 * Each (token, output) is summed along hidden in one order, so a result depends on hidden, the dtypes and the
 * instruction set alone; but it is another order than that of the prefill kernel. Weights that are not contiguous
 * along hidden go to that one.
 *
 * Rows side by side are what makes one core read fast: on a Zen 5 core, 4096 -> 6144 in bfloat16 takes 1.9 ms with 8
 * rows, 2.2 with 2, 2.6 with 1. Prefetching by hand, 512 to 4096 bytes ahead, gained nothing with 8 rows and lost up
 * to a third. Against prefill it wins up to 8 tokens in every dtype, and is even with it at 12.
 */
#define ELEMENT MV_NAME(element, DTYPE)
#define STEP (LANES * UNIT)
_Static_assert(DOT_ROWS <= (int)LANES, "a tile's sums of a token are one vector");

typedef struct {
    const mv_task *task;
    int64_t first, tokens; /* of the chunk */
    float *y;              /* [tokens][units] */
    int64_t units;
} MV_NAME(decode, DTYPE);

static void MV_NAME(decode_norm, DTYPE)(void *context, int64_t begin, int64_t end) {
    const MV_NAME(decode, DTYPE) *decode = context;
    const mv_task *task = decode->task;
    for (int64_t token = begin; token < end; token++) {
        MV_NAME(row, DTYPE) row = MV_NAME(row_of, DTYPE)(task, decode->first + token);
        float *y = decode->y + token * decode->units;
        const float scale = MV_NAME(row_scale, DTYPE)(task, row);
        row = MV_NAME(row_after_scale, DTYPE)(row);
        for (int64_t i = 0; i < task->hidden; i += STEP)
            v_store_f32(y + i / UNIT, MV_NAME(norm_units, DTYPE)(task, row, scale, i), LANES);
    }
}

/* STEP columns from k on, or the n <= STEP that are left. y has zeros there. */
MV_INLINE void MV_NAME(decode_step, DTYPE)(const char *weight, int64_t row_bytes, const float *y, int64_t units,
                                           int64_t k, int n, bool wide, int rows, int tokens,
                                           vf sum[DOT_ROWS][DOT_TOKENS]) {
    MV_UNROLL
    for (int i = 0; i < rows; i++) {
        const vf w = MV_NAME(weight_units, DTYPE)(wide, weight + i * row_bytes, k, n);
        MV_UNROLL
        for (int t = 0; t < tokens; t++)
            sum[i][t] = MV_NAME(v_mac, DTYPE)(w, v_load_f32(y + t * units + k / UNIT, LANES), sum[i][t]);
    }
}

/* `rows` outputs of a span from r on, for `tokens` tokens from `token` on. gates: of a gated layer, [tokens][LANES]. */
MV_INLINE void MV_NAME(decode_tile, DTYPE)(const MV_NAME(decode, DTYPE) * decode, output_span span, int64_t r,
                                           int64_t token, bool wide, int rows, int tokens, float *gates) {
    const mv_task *task = decode->task;
    const int64_t hidden = task->hidden, units = decode->units;
    const int64_t row_bytes = span.block->row_stride * (int64_t)(wide ? sizeof(float) : sizeof(ELEMENT));
    const char *weight = (const char *)span.block->weight + (span.row + r) * row_bytes;
    const float *y = decode->y + token * units;
    const int64_t block = least(hidden, SUM_UNITS(ELEMENT) * STEP);
    double total[DOT_ROWS][DOT_TOKENS] = {{0}}; /* of any number of blocks */
    for (int64_t k = 0; k < hidden; k += block) {
        const int64_t end = least(k + block, hidden), whole = end - (end - k) % STEP;
        vf sum[DOT_ROWS][DOT_TOKENS];
        MV_UNROLL
        for (int i = 0; i < rows; i++) {
            MV_UNROLL
            for (int t = 0; t < tokens; t++) sum[i][t] = v_set(0);
        }
        for (int64_t at = k; at < whole; at += STEP)
            MV_NAME(decode_step, DTYPE)(weight, row_bytes, y, units, at, STEP, wide, rows, tokens, sum);
        if (whole < end) MV_NAME(decode_step, DTYPE)
        (weight, row_bytes, y, units, whole, (int)(end - whole), wide, rows, tokens, sum);
        MV_UNROLL
        for (int i = 0; i < rows; i++) {
            MV_UNROLL
            for (int t = 0; t < tokens; t++) total[i][t] += (double)v_sum(sum[i][t]);
        }
    }

    const int64_t row = span.row + r;
    const vf bias = span_bias(span.block, row, rows);
    for (int t = 0; t < tokens; t++) {
        float finished[LANES] = {0};
        for (int i = 0; i < rows; i++)
            finished[i] = MV_NAME(settle, DTYPE)((float)total[i][t], task, span.block, row + i, y + t * units, 1);
        const vf sums = v_add(v_load_f32(finished, LANES), bias);
        float *of_token = gates ? gates + t * LANES : NULL;
        MV_NAME(finish_outputs, DTYPE)(task, decode->first + token + t, span, r, sums, rows, of_token);
    }
}

/* Of a gated layer the rows of the gate, then those of up, for the same tokens. */
MV_INLINE void MV_NAME(decode_pair, DTYPE)(const MV_NAME(decode, DTYPE) * decode, output_span span, int64_t r,
                                           int64_t token, bool wide, int rows, int tokens) {
    const bool gated = decode->task->linear.gated;
    float gates[DOT_TOKENS * LANES];
    for (int i = 0; i <= gated; i++) MV_NAME(decode_tile, DTYPE)
    (decode, i ? up_span(decode->task, span) : span, r, token, wide, rows, tokens, gated ? gates : NULL);
}

MV_INLINE void MV_NAME(decode_span, DTYPE)(const MV_NAME(decode, DTYPE) * decode, output_span span, bool wide) {
    const int64_t tokens = decode->tokens;
    int64_t r = 0;
    for (; r + DOT_ROWS <= span.count; r += DOT_ROWS) {
        int64_t token = 0;
        for (; token + DOT_TOKENS <= tokens; token += DOT_TOKENS)
            MV_NAME(decode_pair, DTYPE)(decode, span, r, token, wide, DOT_ROWS, DOT_TOKENS);
        for (; token < tokens; token++) MV_NAME(decode_pair, DTYPE)(decode, span, r, token, wide, DOT_ROWS, 1);
    }
    for (; r < span.count; r++)
        for (int64_t token = 0; token < tokens; token++)
            MV_NAME(decode_pair, DTYPE)(decode, span, r, token, wide, 1, 1);
}

static void MV_NAME(decode_outputs, DTYPE)(void *context, int64_t begin, int64_t end) {
    const MV_NAME(decode, DTYPE) *decode = context;
    while (begin < end) {
        const output_span span = next_span(decode->task, &begin, end);
        if (decode->task->linear.weight_dtype == MV_F32)
            MV_NAME(decode_span, DTYPE)(decode, span, true);
        else
            MV_NAME(decode_span, DTYPE)(decode, span, false);
    }
}

mv_kernel MV_NAME(MV_NAME(MV_NAME(mv_linear, DTYPE), prefill), ISA);

mv_status MV_NAME(MV_NAME(MV_NAME(mv_linear, DTYPE), decode), ISA)(const mv_task *task, const mv_decision *decision,
                                                                   mv_error *error) {
#if UNIT == 2
    if (task->linear.weight_dtype == MV_F32) return mv_linear_bf16_decode_avx512(task, decision, error);
#endif
    if (!rows_are_contiguous(task))
        return MV_NAME(MV_NAME(MV_NAME(mv_linear, DTYPE), prefill), ISA)(task, decision, error);
    const int64_t hidden = task->hidden;
    MV_NAME(decode, DTYPE) decode = {task, 0, 0, task->workspace, padded_units(hidden) / UNIT};
    for (; decode.first < task->tokens; decode.first += CHUNK_TOKENS) {
        decode.tokens = least(CHUNK_TOKENS, task->tokens - decode.first);
        mv_parallel_for(decode.tokens, 1 + PARALLEL_ELEMENTS / hidden, MV_NAME(decode_norm, DTYPE), &decode);
        const int64_t rows_worth_a_thread = 1 + PARALLEL_PRODUCTS / (hidden * decode.tokens);
        mv_parallel_for(out_columns(task), round_up(rows_worth_a_thread, DOT_ROWS), MV_NAME(decode_outputs, DTYPE),
                        &decode);
    }
    return MV_OK;
}

#undef ELEMENT
#undef STEP

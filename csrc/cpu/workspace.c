/* workspace.c: the scratch that the projection kernels ask for. What each thread needs of its own is
 * its mv_thread_scratch(), so that no size here depends on the number of threads. */
#include "cpu/workspace.h"

#include "cpu/linear/outputs.h"

size_t mv_prefill_workspace(const mv_task *task) {
    const int64_t tokens = round_up(least(task->tokens, CHUNK_TOKENS), 16);
    return sizeof(float) * (size_t)(CHUNK_TOKENS + tokens * padded_units(task->hidden));
}

size_t mv_decode_workspace(const mv_task *task) {
    const int64_t tokens = least(task->tokens, CHUNK_TOKENS);
    const size_t bytes = sizeof(float) * (size_t)(tokens * padded_units(task->hidden));
    return rows_are_contiguous(task) ? bytes : mv_prefill_workspace(task);
}

/* The next `bytes` bytes, or a place that nobody uses where there is no memory yet. */
static void *take(const mv_task *task, size_t *used, size_t bytes) {
    void *start = task->workspace ? (char *)task->workspace + *used : NULL;
    *used += (size_t)round_up((int64_t)bytes, 64);
    return start;
}

size_t mv_attention_workspace(const mv_task *task, mv_attention_work *work) {
    const mv_attention *a = &task->attention;
    const int64_t keys = least(a->rows, a->window), padded_dim = round_up(task->hidden, 16);
    const int64_t pieces = least((keys + MV_PIECE_KEYS - 1) / MV_PIECE_KEYS, MV_MOST_PIECES);
    const size_t heads = (size_t)task->tokens, row = (size_t)padded_dim * sizeof(float), parts = heads * (size_t)pieces;
    size_t used = 0;
    mv_attention_work all = {task, a->heads / a->kv_heads, padded_dim, pieces, NULL, NULL, NULL, NULL, NULL, NULL};
    all.spans = take(task, &used, heads / (size_t)a->heads * sizeof *all.spans);
    all.q = take(task, &used, heads * row);
    all.spare = take(task, &used, heads / (size_t)all.group * 2 * row);
    all.most = take(task, &used, parts * sizeof(float));
    all.sums = take(task, &used, parts * sizeof(float));
    all.out = take(task, &used, parts * row);
    if (work) *work = all;
    return used;
}

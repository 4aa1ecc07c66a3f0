/* workspace.c: the scratch that the projection kernels ask for. What each thread needs of its own is
 * its mv_thread_scratch(), so that no size here depends on the number of threads. */
#include "workspace.h"

#include "outputs.h"

size_t mv_prefill_workspace(const mv_task *task) {
    const int64_t tokens = round_up(least(task->tokens, CHUNK_TOKENS), 16);
    return sizeof(float) * (size_t)(CHUNK_TOKENS + tokens * padded_units(task->hidden));
}

size_t mv_decode_workspace(const mv_task *task) {
    const int64_t tokens = least(task->tokens, CHUNK_TOKENS);
    const size_t bytes = sizeof(float) * (size_t)(tokens * padded_units(task->hidden));
    return rows_are_contiguous(task) ? bytes : mv_prefill_workspace(task);
}

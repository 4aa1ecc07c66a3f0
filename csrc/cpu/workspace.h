/* workspace.h: bytes of task->workspace that any decode or prefill kernel of the CPU needs for this task: enough for
 * every instruction set and for any number of threads. The norm kernels need none. */
#ifndef MV_CPU_WORKSPACE_H
#define MV_CPU_WORKSPACE_H

#include "kernel.h"

/* The keys of a sequence: positions first to last. count: how many; 0: the sequence is skipped; -1: it cannot be
 * served. */
typedef struct {
    int64_t first, last, count;
    int64_t piece; /* of them are a piece */
} mv_key_span;

/* What decode_attention works with. Rows of q and out have padded_dim columns, q zeros from dim on. */
typedef struct {
    const mv_task *task;
    int64_t group, padded_dim, pieces; /* query heads of a key-value head; of a sequence's keys, at most */
    mv_key_span *spans;                /* [sequences]                                                    */
    float *q;                          /* [sequences, heads]                                             */
    float *spare;                      /* [sequences, kv_heads, 2 padded_dim]                            */
    float *most, *sums, *out;          /* [sequences, heads, pieces]: m, sum p_j, sum p_j v_j            */
} mv_attention_work;

/* Keys that are worth a piece, and the most pieces of a sequence. */
enum { MV_PIECE_KEYS = 512, MV_MOST_PIECES = 16 };

/* The same for it; and where in task->workspace everything is. work: may be NULL. */
size_t mv_attention_workspace(const mv_task *task, mv_attention_work *work);

size_t mv_decode_workspace(const mv_task *task);
size_t mv_prefill_workspace(const mv_task *task);

#endif

/* qk_norm_rope_body.h: mv_qk_norm_rope_<DTYPE>_<ISA>: the norm and the rotary embedding of the heads of q and k, one
 * token after another; with a cache k and v also go to the token's slot.
 *
 * A head is read whole before its place is written, so that outputs may lie exactly on q and k. */
#include "cpu/attention/tokens.h"

#include "cpu/norm/norm_row.h"

#include "cpu/attention/head.h"

#define ELEMENT MV_NAME(element, DTYPE)

MV_INLINE void MV_NAME(store_head, DTYPE)(ELEMENT *to, const float *head, int64_t dim) {
    for (int64_t i = 0; i < dim; i += LANES)
        MV_NAME(v_store, DTYPE)(to + i, v_load_f32(head + i, LANES), (int)least(LANES, dim - i));
}

static void MV_NAME(token_heads, DTYPE)(const mv_task *task, int64_t token, float *head, float *turned) {
    const mv_qk *qk = &task->qk;
    const int64_t dim = task->hidden, inner = task->inner;
    const ELEMENT *q = (const ELEMENT *)task->x.data + mv_row_offset(task->x, inner, token);
    const ELEMENT *k = (const ELEMENT *)qk->k.data + mv_row_offset(qk->k, inner, token);
    ELEMENT *out_q = (ELEMENT *)task->out.data + mv_row_offset(task->out, inner, token);
    ELEMENT *out_k = (ELEMENT *)qk->out_k.data + mv_row_offset(qk->out_k, inner, token);
    const mv_rotary rotary = rotary_of_token(qk, inner, token);
    const slot_place slot = slot_of_token(qk, inner, token);
    for (int64_t h = 0; h < qk->heads; h++) {
        MV_NAME(prepare_head, DTYPE)(q + h * qk->q_stride, dim, &qk->q_norm, &rotary, 0, task->rounding, head, turned);
        MV_NAME(store_head, DTYPE)(out_q + h * qk->out_q_stride, head, dim);
    }
    for (int64_t h = 0; h < qk->kv_heads; h++) {
        MV_NAME(prepare_head, DTYPE)(k + h * qk->k_stride, dim, &qk->k_norm, &rotary, 0, task->rounding, head, turned);
        MV_NAME(store_head, DTYPE)(out_k + h * qk->out_k_stride, head, dim);
        if (!slot.exists) continue;
        const ELEMENT *v = (const ELEMENT *)qk->v.data + mv_row_offset(qk->v, inner, token) + h * qk->v_stride;
        MV_NAME(store_head, DTYPE)((ELEMENT *)qk->keys.data + offset_in_cache(&qk->keys, slot, h), head, dim);
        memcpy((ELEMENT *)qk->values.data + offset_in_cache(&qk->values, slot, h), v, (size_t)dim * sizeof *v);
    }
}

static void MV_NAME(tokens_heads, DTYPE)(void *context, int64_t begin, int64_t end) {
    token_work *work = context;
    const int64_t columns = round_up(work->task->hidden, 16);
    float *head = mv_thread_scratch(2 * (size_t)columns * sizeof *head);
    if (!head) {
        __atomic_store_n(&work->no_memory, true, __ATOMIC_RELAXED);
        return;
    }
    for (int64_t token = begin; token < end; token++)
        MV_NAME(token_heads, DTYPE)(work->task, token, head, head + columns);
}

mv_status MV_NAME(MV_NAME(mv_qk_norm_rope, DTYPE), ISA)(const mv_task *task, const mv_decision *decision,
                                                        mv_error *error) {
    (void)decision;
    token_work work = {task, false};
    const int64_t columns = (task->qk.heads + task->qk.kv_heads) * task->hidden;
    mv_parallel_for(task->tokens, 1 + PARALLEL_HEADS / columns, MV_NAME(tokens_heads, DTYPE), &work);
    if (work.no_memory)
        return mv_fail(error, MV_NO_MEMORY, "qk_norm_rope: no memory for the two heads that each thread works in");
    return MV_OK;
}

#undef ELEMENT

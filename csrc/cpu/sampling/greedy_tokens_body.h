/* greedy_tokens_body.h: mv_greedy_tokens_<DTYPE>_<ISA>: the token of one row after another.
 *
 * A stretch of logits is first asked, by vectors, whether it has a larger one than all in front, or NaN. That is rare:
 * of n stretches in random order some log(n) have. Only then its logits are looked at one by one. */
#include "cpu/sampling/greedy.h"

#define ELEMENT MV_NAME(element, DTYPE)

/* NaN goes unseen by the largest number. But held to -1 and 1 and times 0, it alone makes a sum that is not 0. */
MV_INLINE bool MV_NAME(may_exceed, DTYPE)(const ELEMENT *logits, float most) {
    const vf one = v_set(1), minus_one = v_set(-1), zero = v_set(0);
    vf largest[2] = {v_set(most), v_set(most)}, sum[2] = {zero, zero};
    for (int i = 0; i < STRETCH; i += 2 * LANES) {
        for (int half = 0; half < 2; half++) {
            const vf v = MV_NAME(v_load, DTYPE)(logits + i + half * LANES, LANES);
            largest[half] = v_max(v, largest[half]);
            sum[half] = v_fma(v_min(one, v_max(minus_one, v)), zero, sum[half]);
        }
    }
    float of_lane[LANES], sum_of_lane[LANES];
    v_store_f32(of_lane, v_max(largest[0], largest[1]), LANES);
    v_store_f32(sum_of_lane, v_add(sum[0], sum[1]), LANES);
    int may = 0; /* without branches: the compiler makes vectors of it */
    for (int lane = 0; lane < LANES; lane++) may |= (of_lane[lane] > most) | (sum_of_lane[lane] != 0);
    return may;
}

static int64_t MV_NAME(find_largest, DTYPE)(const ELEMENT *logits, int64_t count) {
    float most = -INFINITY;
    int64_t found = 0;
    for (int64_t begin = 0; begin < count && !isnan(most); begin += STRETCH) {
        const int64_t end = least(begin + STRETCH, count);
        if (end - begin == STRETCH && !MV_NAME(may_exceed, DTYPE)(logits + begin, most)) continue;
        for (int64_t i = begin; i < end; i += LANES) {
            const int n = (int)least(LANES, end - i);
            float of_lane[LANES];
            v_store_f32(of_lane, MV_NAME(v_load, DTYPE)(logits + i, n), LANES);
            for (int lane = 0; lane < n; lane++) {
                if (!exceeds(of_lane[lane], most)) continue;
                most = of_lane[lane];
                found = i + lane;
            }
        }
    }
    return found;
}

static void MV_NAME(choose_tokens, DTYPE)(void *context, int64_t begin, int64_t end) {
    const mv_task *task = context;
    for (int64_t row = begin; row < end; row++) {
        const ELEMENT *logits = (const ELEMENT *)task->x.data + mv_row_offset(task->x, task->inner, row);
        choose_token(task, row, MV_NAME(find_largest, DTYPE)(logits, task->hidden));
    }
}

mv_status MV_NAME(MV_NAME(mv_greedy_tokens, DTYPE), ISA)(const mv_task *task, const mv_decision *decision,
                                                         mv_error *error) {
    (void)decision, (void)error;
    mv_parallel_for(task->tokens, 1 + PARALLEL_ELEMENTS / task->hidden, MV_NAME(choose_tokens, DTYPE), (void *)task);
    return MV_OK;
}

#undef ELEMENT

/* act_and_mul_body.h: mv_act_and_mul_<DTYPE>_<ISA>: silu_and_mul and gelu_and_mul, one row after another. */
#include "cpu/activation/activation.h"

#define ELEMENT MV_NAME(element, DTYPE)

MV_INLINE void MV_NAME(activate_rows, DTYPE)(const mv_task *task, int64_t begin, int64_t end,
                                             mv_activation activation) {
    const int64_t hidden = task->hidden;
    const bool rounds = mv_rounds_each_step(task->rounding);
    for (int64_t token = begin; token < end; token++) {
        const ELEMENT *gate = (const ELEMENT *)task->x.data + mv_row_offset(task->x, task->inner, token);
        ELEMENT *out = (ELEMENT *)task->out.data + mv_row_offset(task->out, task->inner, token);
        for (int64_t i = 0; i < hidden; i += LANES) {
            const int n = (int)least(LANES, hidden - i);
            vf active = v_activation(activation, MV_NAME(v_load, DTYPE)(gate + i, n));
            if (rounds) active = MV_NAME(v_round, DTYPE)(active);
            MV_NAME(v_store, DTYPE)(out + i, v_mul(active, MV_NAME(v_load, DTYPE)(gate + hidden + i, n)), n);
        }
    }
}

static void MV_NAME(act_and_mul_rows, DTYPE)(void *context, int64_t begin, int64_t end) {
    const mv_task *task = context;
    switch (task->activation) {
    case MV_SILU: MV_NAME(activate_rows, DTYPE)(task, begin, end, MV_SILU); break;
    case MV_GELU_TANH: MV_NAME(activate_rows, DTYPE)(task, begin, end, MV_GELU_TANH); break;
    case MV_GELU: MV_NAME(activate_rows, DTYPE)(task, begin, end, MV_GELU); break;
    }
}

mv_status MV_NAME(MV_NAME(mv_act_and_mul, DTYPE), ISA)(const mv_task *task, const mv_decision *decision,
                                                       mv_error *error) {
    (void)decision, (void)error;
    mv_parallel_for(task->tokens, 1 + PARALLEL_ACTIVATIONS / task->hidden, MV_NAME(act_and_mul_rows, DTYPE),
                    (void *)task);
    return MV_OK;
}

#undef ELEMENT

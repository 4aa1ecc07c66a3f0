/* decode_attention_mma_sm80.cu: the attention of decode_attention_mma.cuh on any GPU: a second launch merges pieces. */
#include "cuda/attention/decode_attention_mma.cuh"
#include "cuda/cuda.h"

extern "C" const char *mv_attention_mma_sm80_decide(const mv_task *task, double below, mv_decision *decision) {
    return decide_mma<false>(task, below, decision);
}
extern "C" mv_status mv_decode_attention_f16_mma_sm80(const mv_task *task, const mv_decision *decision,
                                                      mv_error *error) {
    return run_attention(task, decision, error);
}
extern "C" mv_status mv_decode_attention_bf16_mma_sm80(const mv_task *task, const mv_decision *decision,
                                                       mv_error *error) {
    return run_attention(task, decision, error);
}

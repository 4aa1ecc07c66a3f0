/* greedy_tokens_sm80.cu: greedy_tokens.cuh on any GPU: a block for each row. */
#include "cuda/cuda.h"
#include "cuda/sampling/greedy_tokens.cuh"

extern "C" const char *mv_greedy_sm80_decide(const mv_task *task, double below, mv_decision *decision) {
    return decide_rows<false>(task, below, decision);
}
extern "C" mv_status mv_greedy_tokens_f32_sm80(const mv_task *task, const mv_decision *decision, mv_error *error) {
    return launch_rows<float, false>(task, decision, error);
}
extern "C" mv_status mv_greedy_tokens_f16_sm80(const mv_task *task, const mv_decision *decision, mv_error *error) {
    return launch_rows<__half, false>(task, decision, error);
}
extern "C" mv_status mv_greedy_tokens_bf16_sm80(const mv_task *task, const mv_decision *decision, mv_error *error) {
    return launch_rows<__nv_bfloat16, false>(task, decision, error);
}

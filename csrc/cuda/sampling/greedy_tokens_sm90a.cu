/* greedy_tokens_sm90a.cu: greedy_tokens.cuh on Hopper: a cluster for each row. */
#include "cuda/cuda.h"
#include "cuda/sampling/greedy_tokens.cuh"

extern "C" const char *mv_greedy_sm90a_decide(const mv_task *task, double below, mv_decision *decision) {
    return decide_rows<true>(task, below, decision);
}
extern "C" mv_status mv_greedy_tokens_f32_sm90a(const mv_task *task, const mv_decision *decision, mv_error *error) {
    return launch_rows<float, true>(task, decision, error);
}
extern "C" mv_status mv_greedy_tokens_f16_sm90a(const mv_task *task, const mv_decision *decision, mv_error *error) {
    return launch_rows<__half, true>(task, decision, error);
}
extern "C" mv_status mv_greedy_tokens_bf16_sm90a(const mv_task *task, const mv_decision *decision, mv_error *error) {
    return launch_rows<__nv_bfloat16, true>(task, decision, error);
}

/* cuda.h: what the ops ask of the CUDA backend beside its kernels. Plain C. */
#ifndef MV_CUDA_H
#define MV_CUDA_H

#include "kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What the ops know of a GPU. Asked of the driver once per device. */
typedef struct {
    int32_t compute_capability, sm_count, smem_bytes, l2_bytes;
    int32_t memory_gbs; /* as its clock and width say; 0 where the driver does not tell them */
    bool programmatic_launch;
} mv_gpu;

/* MV_OK when kernels of this build can run on that device; otherwise the sentence that says why not. */
mv_status mv_gpu_ready(int32_t device, mv_gpu *gpu, mv_error *error);

/* The GPU that is current in this thread; 0 where CUDA cannot tell. */
int32_t mv_cuda_current_device(void);

/* What the projection kernels make of a task. */
mv_decide mv_decode_sm80_decide, mv_decode_sm90a_decide, mv_decode_heads_sm90a_decide;
mv_decide mv_norm_mma_sm80_decide, mv_norm_wgmma_sm90a_decide, mv_wgmma_sm90a_decide;
mv_decide mv_norm_few_sm80_decide, mv_norm_3xtf32_sm90a_decide, mv_ffma_sm80_decide, mv_norm_ffma_sm80_decide;

/* Of decode_attention. */
mv_decide mv_attention_sm80_decide, mv_attention_mma_sm80_decide, mv_attention_mma_sm90a_decide;

/* Of greedy_tokens. */
mv_decide mv_greedy_sm80_decide, mv_greedy_sm90a_decide;

/* Why the tensor cores cannot multiply this task's 16-bit values, or NULL. */
const char *mv_tensor_cores_why_not(const mv_task *task);

#ifdef __cplusplus
}
#endif
#endif

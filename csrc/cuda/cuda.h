/* cuda.h: what the ops ask of the CUDA backend beside its kernels. Plain C. */
#ifndef MV_CUDA_H
#define MV_CUDA_H

#include "../kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What the ops know of a GPU. Asked of the driver once per device. */
typedef struct {
    int32_t compute_capability, sm_count, smem_bytes, l2_bytes;
    bool programmatic_launch;
} mv_gpu;

/* MV_OK when kernels of this build can run on that device; otherwise the sentence that says why not. */
mv_status mv_gpu_ready(int32_t device, mv_gpu *gpu, mv_error *error);

/* The GPU that is current in this thread; 0 where CUDA cannot tell. */
int32_t mv_cuda_current_device(void);

/* Legality of the projection kernels: NULL, or the reason why this task is not for them. */
const char *mv_decode_fits(const mv_task *task);
const char *mv_decode_sm90a_fits(const mv_task *task);
double mv_decode_sm90a_cost(const mv_task *task);
const char *mv_decode_heads_sm90a_fits(const mv_task *task);
const char *mv_norm_mma_fits(const mv_task *task); /* of the plan: the rows of x may lie anywhere */
const char *mv_norm_wgmma_fits(const mv_task *task);
const char *mv_wgmma_fits(const mv_task *task);
double mv_wgmma_late_share(const mv_task *task); /* of the time of the plan of two launches */
const char *mv_norm_few_fits(const mv_task *task);
const char *mv_norm_3xtf32_fits(const mv_task *task);
double mv_norm_3xtf32_cost(const mv_task *task);

/* Workspace of the plans that write the normalised rows before the product. */
size_t mv_norm_plan_workspace(const mv_task *task);
size_t mv_norm_wgmma_workspace(const mv_task *task);
size_t mv_norm_3xtf32_workspace(const mv_task *task);

#ifdef __cplusplus
}
#endif
#endif

/* kernel.h: what the ops hand to a kernel, after every check, and what the kernels share.
 *
 * A task says where the numbers are; a kernel computes. Every kernel of every op has the same signature, so a list of
 * kernels is an array of one function type, and a plan of two launches is a kernel that calls two others.
 */
#ifndef MV_KERNEL_H
#define MV_KERNEL_H

#include "mv.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A matrix whose row r starts (r / inner) * outer_stride + (r % inner) * inner_stride elements past data, `inner` being
 * the task's. The columns are contiguous. NULL data: absent. */
typedef struct {
    void *data;
    int64_t outer_stride, inner_stride;
} mv_rows;

/* Some consecutive outputs of the projection: W[n][k] is weight[n * row_stride + k * col_stride]. */
typedef struct {
    const void *weight;
    const void *bias; /* NULL: none */
    int64_t outputs;  /* 0: the block is absent */
    int64_t row_stride, col_stride;
    mv_dtype bias_dtype;
} mv_block;

typedef struct {
    mv_device device;
    void *stream;
    void *workspace;
    int32_t sm_count, compute_capability; /* of the GPU; 0 on the CPU */
    int32_t smem_bytes;                   /* shared memory a block may ask for */
    int32_t l2_bytes;
    bool programmatic_launch; /* the GPU and this binary's code for it know griddepcontrol */
    bool launch_early;        /* the next kernel of the stream has work to do before it waits for this one */
    uint32_t *counters;       /* the norm zeroes these for the next kernel of the stream */
    int64_t counter_count;
    /* Or 0: the norm writes float32 as a TF32 and, so many elements behind it, what that leaves; with allow_tf32 only
     * the former. */
    int64_t low_plane;

    /* The norm, which every op begins with. */
    mv_dtype dtype; /* of x, residual, out, residual_out */
    int64_t tokens, inner, hidden;
    mv_rows x, residual, residual_out, out; /* out: [tokens, hidden] for a norm op, else [tokens, outputs] */
    const void *norm_weight;                /* NULL, in norm ops only: ones */
    mv_dtype norm_weight_dtype;
    float eps, weight_offset;
    mv_rounding rounding;

    /* The projection: rms_norm_qkv only, zero otherwise. q, k and v are three blocks, adjacent in memory when
     * packed; blocks of one task share the weight dtype, and col_stride is 1 in all of them or in none. A task may
     * have fewer. */
    mv_block block[3];
    int64_t outputs; /* of all blocks */
    mv_dtype weight_dtype;
    bool packed; /* the blocks are one matrix: block[0] with `outputs` rows (and one bias, or none) */
    bool batch_invariant, allow_tf32;
    bool static_weights; /* weights, norm weights and biases may be read before griddepcontrol.wait */
} mv_task;

typedef mv_status mv_kernel(const mv_task *task, mv_error *error);

static inline int64_t mv_row_offset(mv_rows rows, int64_t inner, int64_t r) {
    return (r / inner) * rows.outer_stride + (r % inner) * rows.inner_stride;
}

static inline size_t mv_dtype_bytes(mv_dtype dtype) { return dtype == MV_F32 ? 4 : 2; }

/* Leaves a sentence in *error and gives back status, so that a refusal is one return statement. */
mv_status mv_fail(mv_error *error, mv_status status, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 3, 4)))
#endif
    ;

#ifdef __cplusplus
}
#endif
#endif

/* kernel.h: what the ops hand to a kernel, after every check, and what the kernels share.
 *
 * A task says where the numbers are; a kernel computes. Every kernel of every op has the same signature, so a list of
 * kernels is an array of one function type, and a plan of two launches is a kernel that calls two others.
 */
#ifndef MV_KERNEL_H
#define MV_KERNEL_H

#include <math.h>

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

/* The norm that an op is, or that it begins with: s = x, or rn(x + residual); y = s * r * (weight_offset + weight). */
typedef struct {
    mv_rows residual, residual_out; /* [tokens, hidden], of x's dtype                 */
    mv_rows added;                  /* the same: of norm_add, which adds it to y      */
    const void *weight;             /* NULL, in norm ops only: ones                   */
    mv_dtype weight_dtype;
    float eps, weight_offset;
} mv_norm;

/* Some consecutive outputs of a linear layer: W[n][k] is weight[n * row_stride + k * col_stride]. */
typedef struct {
    const void *weight;
    const void *bias; /* NULL: none */
    int64_t outputs;  /* 0: the block is absent */
    int64_t row_stride, col_stride;
    mv_dtype bias_dtype;
} mv_block;

/* A linear layer whose outputs are some blocks, such as those of q, k and v, adjacent in memory when packed. The blocks
 * of one task share the weight dtype, and col_stride is 1 in all of them or in none. */
enum { MV_MAX_BLOCKS = 3 };
typedef struct {
    mv_block block[MV_MAX_BLOCKS];
    int64_t outputs; /* of all blocks; 0: there is no linear layer */
    mv_dtype weight_dtype;
    bool packed; /* the blocks are one matrix: block[0] with `outputs` rows (and one bias, or none) */
    bool allow_tf32;
    bool plain_x;   /* it multiplies x as it is, and there is no norm; else y, the norm of x */
    bool gated;     /* two blocks, gate and up, as many outputs each: out has one column for each pair of them */
    mv_rows addend; /* [tokens, outputs], of x's dtype: out = rn(rn(rn(sum + bias) * scale) + addend) */
    float scale;    /* where there is an addend; "fp32" rounds once, the others after a scale only where it is not 1 */
} mv_linear_layer;

/* What the norm does for the next launch of its plan, which multiplies its output. */
typedef struct {
    bool launch_early;  /* the next kernel of the stream has work to do before it waits for this one */
    uint32_t *counters; /* zeroed for it */
    int64_t counter_count;
    int64_t low_plane; /* nonzero: the distance in elements from the high TF32 part of y to the low part, which is left
                          out with allow_tf32 */
} mv_next_launch;

/* Integers on the task's device, `stride` elements apart, which are read when the kernel runs. NULL data: absent. */
typedef struct {
    const void *data;
    int64_t stride;
    bool wide; /* int64, else int32 */
} mv_integers;

/* Keys or values: row r of head h of block b starts b * block_stride + r * row_stride + h * head_stride elements past
 * data. A block is a page, or what a sequence has. */
typedef struct {
    void *data;
    int64_t block_stride, row_stride, head_stride;
} mv_cache;

/* The norm and the rotary embedding of heads. weight NULL: no norm; columns 0: no embedding. */
typedef struct {
    const void *weight; /* [dim] */
    mv_dtype weight_dtype;
    float eps, weight_offset;
} mv_head_norm;

/* Row s of cos and sin is sequence s's; what is behind `columns` passes through. */
typedef struct {
    const void *cos, *sin;
    mv_dtype dtype;
    int64_t cos_stride, sin_stride, columns;
    bool interleaved; /* pairs are neighbours, else one is in each half */
} mv_rotary;

/* One new token per sequence, and the cache that it joins. Position p of a sequence is row p of its own, or of a ring
 * p modulo rows; with a block table that is a row of the page that the table has for it. */
typedef struct {
    int64_t heads, kv_heads; /* query heads for each sequence; heads of k and v, which divide them */
    mv_rows k, v;            /* [sequences, kv_heads]: row (sequence, head) as outer and inner  */
    mv_head_norm q_norm, k_norm;
    mv_rotary rotary;
    mv_cache keys, values;
    int64_t rows, block_rows, blocks; /* of a sequence at most, up to 2^30; of a block; in the cache */
    const int32_t *block_table;       /* NULL: block b is sequence b's. Outside of [0, blocks): there is no page */
    int64_t table_stride;
    bool ring, static_rows;        /* static_rows: the older rows may be read before griddepcontrol.wait */
    mv_integers positions, starts; /* of each sequence: keys before the new token's; the first that counts */
    int64_t window;                /* keys that the token attends to at most, itself included */
    float scale, soft_cap;         /* soft_cap 0: none */
} mv_attention;

/* Some tokens' heads, and the cache that k and v join. Row t of each mv_rows is token t's, and a head is so many
 * elements past the one before. */
typedef struct {
    int64_t heads, kv_heads;
    mv_rows k, v, out_k; /* q and out_q are the task's x and out; v: with a cache only */
    int64_t q_stride, k_stride, v_stride, out_q_stride, out_k_stride;
    mv_head_norm q_norm, k_norm;
    mv_rotary rotary; /* but for its rows: */
    mv_rows cos, sin; /* stride 0 where they are the same for several tokens */
    mv_rows slots;    /* block * block_rows + row; outside of the cache: not cached. NULL: there is no cache */
    bool wide_slots;  /* int64, else int32 */
    mv_cache keys, values;
    int64_t blocks, block_rows;
} mv_qk;

/* What follows the choice of a token, for each row of logits; a part that is absent has no data. */
typedef struct {
    mv_rows finished; /* bool */
    const bool *ends; /* [vocabulary], where there is finished */
    const int64_t *pad;
    mv_rows history, counts, positions; /* int64; of history [length], where there are counts */
    int64_t length;
} mv_greedy;

typedef struct {
    const char *op; /* that was called: for messages */
    mv_device device;
    void *stream;
    void *workspace;
    int32_t sm_count, compute_capability; /* of the GPU; 0 on the CPU */
    int32_t smem_bytes;                   /* shared memory a block may ask for */
    int32_t l2_bytes;
    int32_t memory_gbs;       /* of the GPU, in theory; 0: unknown */
    bool programmatic_launch; /* the GPU and this binary's code for it know griddepcontrol */
    bool static_weights;      /* weights, norm weights and biases may be read before griddepcontrol.wait */
    bool batch_invariant;     /* a row's bits must not depend on the number of rows */
    mv_rounding rounding;
    mv_dtype dtype; /* of x and out, and of what joins them row by row */
    int64_t tokens, inner, hidden;
    mv_rows x, out; /* x: [tokens, hidden]; out: [tokens, linear.outputs], or half of those where it is gated, or
                       [tokens, hidden] without a linear layer */
    mv_norm norm;
    mv_linear_layer linear;
    mv_activation activation; /* of a gated layer; and of act_and_mul: there x is gate | up, [tokens, 2 hidden], and out
                                 [tokens, hidden] */
    mv_next_launch next;
    union {
        mv_greedy greedy; /* of greedy_tokens: there x is the logits, and out int64, one token for each row */
        mv_qk qk;         /* of qk_norm_rope: there x and out are q and out_q, a row of which is a token's first head */
        mv_attention
            attention; /* of decode_attention: there x and out are the query heads of all sequences, one a row */
    };
} mv_task;

/* What a row of a kernel list makes of a task: what it will take, and how it cuts it. Its launch goes by this and
 * decides nothing again. */
typedef struct mv_decision mv_decision;
typedef mv_status mv_kernel(const mv_task *task, const mv_decision *decision, mv_error *error);
struct mv_decision {
    double us;         /* an estimate; the cheapest row that can serve a task wins */
    size_t workspace;  /* bytes of scratch memory                                  */
    mv_kernel *launch; /* where a row has several instances: the chosen one        */
    uint64_t cut[6];   /* the row's own: sizes of tiles and the like               */
};

/* NULL where the row can serve the task: *decision says how. Else the reason. A row that will take `below` microseconds
 * or more gives up at once, with mv_too_dear; below is MV_ANY_PRICE where the price does not matter. */
typedef const char *mv_decide(const mv_task *task, double below, mv_decision *decision);
extern const char mv_too_dear[];
#define MV_ANY_PRICE ((double)NAN)

/* Is it worth deciding more? Notes the price, and wants no workspace. */
static inline bool mv_at_price(mv_decision *decision, double us, double below) {
    decision->us = us;
    decision->workspace = 0;
    return !(us >= below);
}

#ifdef __CUDACC__
#define MV_ANYWHERE __host__ __device__
#else
#define MV_ANYWHERE
#endif

/* Is x * r rounded before the norm weight multiplies it? */
MV_ANYWHERE static inline bool mv_norm_rounds_twice(mv_rounding rounding) { return rounding == MV_ROUNDING_HF; }

/* Is each step of a call rounded: the norm in front of a product, a product in front of what joins it? */
MV_ANYWHERE static inline bool mv_rounds_each_step(mv_rounding rounding) { return rounding != MV_ROUNDING_FP32; }

static inline int64_t mv_row_offset(mv_rows rows, int64_t inner, int64_t r) {
    return (r / inner) * rows.outer_stride + (r % inner) * rows.inner_stride;
}

static inline size_t mv_dtype_bytes(mv_dtype dtype) {
    static const unsigned char bytes[] = {4, 2, 2, 4, 8, 1}; /* in the order of mv_dtype */
    return bytes[dtype];
}

/* Leaves a sentence in *error and gives back status, so that a refusal is one return statement. */
mv_status mv_fail(mv_error *error, mv_status status, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((cold, format(printf, 3, 4)))
#endif
    ;

#ifdef __cplusplus
}
#endif
#endif

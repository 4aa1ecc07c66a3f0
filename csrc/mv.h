/* mv.h: the C interface of minivllm.
 *
 * Fused decoder-layer kernels on tensors somebody else owns, on the CPU or on an NVIDIA GPU. Valid C11 and C++17.
 * An op is one args struct and one entry. Zero-initialise the struct, fill in what the op needs, and call; a view left
 * at zero is an absent tensor. An entry checks every argument, picks the cheapest kernel that fits, and either makes a
 * plan and returns MV_OK, or leaves one sentence in the caller's mv_error that names the argument, what it is and what
 * it should be. The plan says what the caller may still have to allocate; mv_run() runs it:
 *
 *     mv_rms_norm_args args = {.x = x, .weight = weight, .out = out, .eps = 1e-6};
 *     mv_plan plan;
 *     mv_error error;
 *     if (mv_rms_norm(&args, &plan, &error) != MV_OK || mv_run(&plan, NULL, &error) != MV_OK) puts(error.text);
 *
 * Nothing here allocates device memory or synchronises, except where it says so.
 */
#ifndef MV_H
#define MV_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MV_VERSION "0.1.0"

/* Numbers; integers, of positions and indices only; and bytes of 0 and 1, of flags only. */
typedef enum { MV_F32, MV_F16, MV_BF16, MV_I32, MV_I64, MV_BOOL } mv_dtype;
typedef enum { MV_CPU, MV_CUDA } mv_device_kind;

typedef enum {
    MV_OK,
    MV_BAD_TYPE,     /* a dtype is not supported, or two do not go together     */
    MV_BAD_VALUE,    /* a shape, stride, device, overlap, number or kernel name */
    MV_DEVICE_ERROR, /* CUDA said no, or this build or machine has no CUDA      */
    MV_NO_MEMORY
} mv_status;

typedef enum {
    MV_ROUNDING_HF,      /* y = rn(rn(x * r) * (offset + w)): what HF Llama/Qwen, vLLM and nano-vllm do       */
    MV_ROUNDING_HF_ONCE, /* y = rn(x * r * (offset + w)), all else as in MV_ROUNDING_HF: HF Gemma and OLMo 2  */
    MV_ROUNDING_FP32     /* the same y, and float32 between the steps of a call, such as y and its projection */
} mv_rounding;

typedef enum {
    MV_SILU,      /* z / (1 + exp(-z))                                           */
    MV_GELU_TANH, /* 0.5 z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3)))           */
    MV_GELU       /* 0.5 z (1 + erf(z / sqrt(2)))                                */
} mv_activation;

typedef enum { MV_APPROXIMATE_TANH, MV_APPROXIMATE_NONE } mv_approximate; /* of gelu: MV_GELU_TANH or MV_GELU */

typedef enum {
    MV_LAYOUT_AUTO,   /* the shape decides; weights that are all square are refused */
    MV_LAYOUT_OUT_IN, /* [qkv, hidden], as nn.Linear keeps it                     */
    MV_LAYOUT_IN_OUT  /* [hidden, qkv]                                            */
} mv_weight_layout;

typedef enum {
    MV_CACHE_STATIC, /* [sequences, kv_heads, rows, head_dim]: no pages */
    MV_CACHE_NHD,    /* [pages, rows, kv_heads, head_dim]               */
    MV_CACHE_HND     /* [pages, kv_heads, rows, head_dim]               */
} mv_cache_layout;

typedef struct {
    mv_device_kind kind;
    int32_t index; /* of the GPU; 0 on the CPU */
} mv_device;

/* The text of a refusal. The caller owns it; an entry writes it only when it does not return MV_OK. */
typedef struct {
    char text[512];
} mv_error;

/* A tensor somebody else owns. Strides count elements and may be anything, also 0 or negative; NULL means C-contiguous.
 * The stride of a dimension of size 0 or 1 is never read. All zero (no dimensions and no data): absent. */
typedef struct {
    void *data;
    const int64_t *shape;
    const int64_t *strides;
    int32_t ndim;
    mv_dtype dtype;
    mv_device device;
    bool read_only; /* refused as an output */
} mv_view;

/* Does it have at most 2^60 elements, which lie at most 2^60 bytes apart and do not wrap around the end of all memory?
 * Every op requires that of every tensor. */
bool mv_is_addressable(const mv_view *view);

/* What every call carries beside its tensors. */
typedef struct {
    const char *op;     /* the name in messages; NULL: the entry's own                                        */
    const char *kernel; /* a row of mv_kernel_at() by name, to force it; NULL: the cheapest that fits         */
    void *stream;       /* cudaStream_t to launch on; ignored on the CPU                                      */
    bool plain_launch;  /* begin when all work in front on the stream has finished, and not a little earlier  */
} mv_call;

/* An output of an op: it goes to the member `name` of the args, or where that is absent to where mv_run() is told. Its
 * shape is that of `like`, one of the args' views, but for the last dimension, which has so many columns. */
enum { MV_MAX_OUTPUTS = 4 };
typedef struct {
    const char *name;
    const mv_view *like;
    int64_t columns; /* 0: it has no last dimension, but one number for each row */
    mv_dtype dtype;
} mv_output;

/* A call that was checked, and its kernels. The caller owns it and may drop it at any time; it holds no reference, so
 * the args and the tensors' memory have to live until it has run. */
typedef struct {
    int outputs;
    mv_output output[MV_MAX_OUTPUTS]; /* in the order of the op's results                                            */
    mv_weight_layout weight_layout;   /* what the weights of a linear layer were taken for: not AUTO then             */
    size_t workspace_bytes;           /* scratch that the kernels want                                               */
    bool is_long;         /* computes on the CPU for more than some tens of microseconds (release the GIL) */
    uint64_t state[1152]; /* the library's own */
} mv_plan;

/* Memory that the args did not name, all of it on x's device. */
typedef struct {
    void *output[MV_MAX_OUTPUTS]; /* of the plan's outputs those that were absent: C-contiguous, 16-byte aligned,
                                     overlapping nothing; a residual_out that is NULL here too is not written         */
    void *workspace;              /* workspace_bytes, 256-byte aligned, free again when the stream has passed the run */
} mv_memory;

/* Runs a plan on the stream of its args; it may run again. memory: may be NULL when nothing is wanted of it. */
mv_status mv_run(mv_plan *plan, const mv_memory *memory, mv_error *error);

/* ---- rms_norm, add_rms_norm -----------------------------------------------------------------------------------
 *
 *   s   = x, or rn(x + residual) when there is a residual
 *   r   = 1 / sqrt(mean(s^2) + eps)
 *   out = s * r * (weight_offset + weight), rounded as `rounding` says;  residual_out = s
 *
 * rn rounds to x's dtype, sums are float32. x, residual, out, residual_out: [..., hidden], one shape and dtype, any
 * strides of the leading dimensions, the last one contiguous. weight: [hidden], x's dtype or float32; absent: ones. An
 * output may be exactly x or exactly residual (in place), any other overlap is refused; or absent: mv_run() is then
 * told where. */
typedef struct {
    mv_call call;
    mv_view x, residual, weight;
    mv_view out, residual_out; /* residual_out: with residual only */
    double eps, weight_offset;
    mv_rounding rounding;
} mv_rms_norm_args;

mv_status mv_rms_norm(const mv_rms_norm_args *args, mv_plan *plan, mv_error *error);
mv_status mv_add_rms_norm(const mv_rms_norm_args *args, mv_plan *plan, mv_error *error);

/* ---- norm_add -------------------------------------------------------------------------------------------------
 *
 *   out = rn(residual + y),  y = rms_norm of x, rounded to x's dtype first but in MV_ROUNDING_FP32
 *
 * As rms_norm, with a residual of x's shape and dtype, which is added behind the norm. out may be exactly x or exactly
 * residual; there is no residual_out. */
mv_status mv_norm_add(const mv_rms_norm_args *args, mv_plan *plan, mv_error *error);

/* ---- rms_norm_qkv ---------------------------------------------------------------------------------------------
 *
 *   out[t][n] = rn(sum_k y[t][k] * W[n][k] + bias[n]),  y = rms_norm of x (or of s = rn(x + residual)) as above
 *
 * x, residual, residual_out: [..., hidden]. out: [..., qkv], packed q | k | v, where qkv = (num_heads + 2 num_kv_heads)
 * * head_dim. qkv_weight: one packed matrix in [0] (the other two absent), or wq, wk, wv; each [out, hidden] or its
 * transpose, of any strides, x's dtype or float32. bias: packed [qkv] in [0], or three, or absent. No output may
 * overlap an input or the other output; one that is absent is given to mv_run(). */
typedef struct {
    mv_call call;
    mv_view x, residual, norm_weight;
    mv_view qkv_weight[3];
    mv_view bias[3];
    mv_view out, residual_out;
    int64_t num_heads, num_kv_heads;
    int64_t head_dim; /* 0: qkv / (num_heads + 2 num_kv_heads) */
    double eps, weight_offset;
    mv_rounding rounding;
    mv_weight_layout weight_layout;
    bool batch_invariant; /* a row's bits do not depend on how many other rows there are          */
    bool allow_tf32;      /* float32 products may be rounded to TF32                               */
    bool static_weights; /* the caller vouches: no unfinished work in front of this call on its stream writes weights */
} mv_rms_norm_qkv_args;

mv_status mv_rms_norm_qkv(const mv_rms_norm_qkv_args *args, mv_plan *plan, mv_error *error);

/* ---- rms_norm_linear ------------------------------------------------------------------------------------------
 *
 *   out[t][n] = rn(sum_k y[t][k] * W[n][k] + bias[n]),  y = rms_norm of x (or of s = rn(x + residual)) as above
 *
 * As rms_norm_qkv, of one weight [outputs, hidden] or its transpose, with any number of outputs: out is
 * [..., outputs]. */
typedef struct {
    mv_call call;
    mv_view x, residual, norm_weight;
    mv_view weight, bias;
    mv_view out, residual_out;
    double eps, weight_offset;
    mv_rounding rounding;
    mv_weight_layout weight_layout;
    bool batch_invariant, allow_tf32, static_weights; /* as rms_norm_qkv's */
} mv_rms_norm_linear_args;

mv_status mv_rms_norm_linear(const mv_rms_norm_linear_args *args, mv_plan *plan, mv_error *error);

/* ---- rms_norm_gate_up -----------------------------------------------------------------------------------------
 *
 *   g, u = the products of y = rms_norm of x (or of s = rn(x + residual)), as above, with the two weights, and biases
 *   MV_ROUNDING_HF, _HF_ONCE: out = rn(rn(activation(rn(g))) * rn(u))
 *   MV_ROUNDING_FP32:         out = rn(activation(g) * u)
 *
 * gate_up_weight: one packed matrix [2 d, hidden] in [0], whose first d outputs are those of the gate (the other view
 * absent), or the gate's and the up projection's, of one dtype; each as in rms_norm_qkv. bias: packed [2 d] in [0], or
 * two, or absent. out: [..., d]. Where the activation is NaN or infinite is said of silu_and_mul. */
typedef struct {
    mv_call call;
    mv_view x, residual, norm_weight;
    mv_view gate_up_weight[2];
    mv_view bias[2];
    mv_view out, residual_out;
    double eps, weight_offset;
    mv_activation activation;
    mv_rounding rounding;
    mv_weight_layout weight_layout;
    bool batch_invariant, allow_tf32, static_weights; /* as rms_norm_qkv's */
} mv_rms_norm_gate_up_args;

mv_status mv_rms_norm_gate_up(const mv_rms_norm_gate_up_args *args, mv_plan *plan, mv_error *error);

/* ---- silu_and_mul, gelu_and_mul -------------------------------------------------------------------------------
 *
 *   MV_ROUNDING_HF, _HF_ONCE: out = rn(rn(activation(gate)) * up)
 *   MV_ROUNDING_FP32:         out = rn(activation(gate) * up)
 *
 * x: [..., 2 d], a row of which is gate | up, so its last dimension is even; out: [..., d]. One dtype, any strides of
 * the leading dimensions, the last one contiguous. out may share no byte with x, not even where it is exactly the gate
 * half; or it is absent, and mv_run() is told where.
 *
 * NaN and infinity come where the formulas have them in float32. The activation of a gate of -infinity is NaN. It is
 * -0 where the exponential in it leaves float32 (in silu for z below -88.7), and an infinite up makes NaN of that. The
 * gelus are computed without the cancellation in 1 + tanh and 1 + erf, as z / (1 + exp(-2 sqrt(2 / pi) (z + 0.044715
 * z^3))) and as z times the normal distribution, so that small results are right too. */
typedef struct {
    mv_call call;
    mv_view x, out;
    mv_approximate approximate; /* of gelu_and_mul */
    mv_rounding rounding;
} mv_act_and_mul_args;

mv_status mv_silu_and_mul(const mv_act_and_mul_args *args, mv_plan *plan, mv_error *error);
mv_status mv_gelu_and_mul(const mv_act_and_mul_args *args, mv_plan *plan, mv_error *error);

/* ---- linear, linear_add ---------------------------------------------------------------------------------------
 *
 *   linear:      out[t][n] = rn(sum_k x[t][k] * W[n][k] + bias[n])
 *   linear_add:  out[t][n] = rn(rn(rn(sum_k x[t][k] * W[n][k] + bias[n]) * scale) + residual[t][n])
 *
 * The inner roundings are those of MV_ROUNDING_HF and _HF_ONCE, the one after the product is left out where scale is 1;
 * MV_ROUNDING_FP32 rounds once. x: [..., hidden]. weight and bias as in rms_norm_linear. residual, out:
 * [..., outputs], of x's dtype; out may be exactly residual, and must overlap nothing else. */
typedef struct {
    mv_call call;
    mv_view x, weight, bias;
    mv_view residual; /* of linear_add only */
    mv_view out;
    double scale; /* of linear_add only, where 1 changes nothing */
    mv_rounding rounding;
    mv_weight_layout weight_layout;
    bool batch_invariant, allow_tf32, static_weights; /* as rms_norm_qkv's */
} mv_linear_args;

mv_status mv_linear(const mv_linear_args *args, mv_plan *plan, mv_error *error);
mv_status mv_linear_add(const mv_linear_args *args, mv_plan *plan, mv_error *error);

/* ---- decode_attention -----------------------------------------------------------------------------------------
 *
 *   out = softmax(s_j) v_j,  s_j = scale q k_j, or soft_cap tanh(scale q k_j / soft_cap)
 *
 * for j from max(starts, p - window + 1) to p, where p = positions is how many tokens the sequence has in the cache.
 *
 * One new token per sequence: k and v join the cache at p, k and q after the norm of their heads, where there is a
 * weight, and after the rotary embedding, where there are cos and sin. q, out: [sequences, heads, head_dim], one shape,
 * with or without a dimension of 1 behind the first; k, v: [sequences, kv_heads, head_dim], alike; heads a multiple of
 * kv_heads, head_dim up to 1024. positions, starts: int32 or int64, [sequences] or [], read when the kernel runs. cos,
 * sin: [..., R], R even and at most head_dim, leading dimensions of 1 but for one of the sequences; of q's dtype or
 * float32. Norm weights: [head_dim], likewise.
 *
 * The caches are written to. Position p is row p of the sequence's rows, up to 2^30 of them; with `ring` p modulo their
 * number, which the window must not exceed; with a block_table, int32 [sequences, blocks], row p % page of the page
 * that it has for p / page, where negative is none.
 *
 * A sequence whose p is negative is skipped: its out is zeros. Where p or a page it needs is outside of the cache, or
 * starts exceeds p, out is NaN. Neither writes to the cache. No two sequences of a call may write to one row, or read
 * what another writes. */
typedef struct {
    mv_call call;
    mv_view q, k, v, key_cache, value_cache, positions;
    mv_view cos, sin, q_norm_weight, k_norm_weight;
    double eps, weight_offset;
    bool interleaved; /* the pairs of the rotary embedding are neighbours, else one is in each half of R */
    mv_view block_table;
    mv_cache_layout cache_layout;
    bool ring;
    mv_view starts;
    double scale;    /* 0: 1 / sqrt(head_dim) */
    int64_t window;  /* 0: all keys           */
    double soft_cap; /* 0: none               */
    mv_view out;
    mv_rounding rounding;
    bool batch_invariant; /* the bits of a sequence do not depend on the others */
    bool static_weights;  /* as rms_norm_qkv's                                  */
    bool static_rows;     /* the same of what the caches hold already           */
} mv_decode_attention_args;

mv_status mv_decode_attention(const mv_decode_attention_args *args, mv_plan *plan, mv_error *error);

/* ---- qk_norm_rope ---------------------------------------------------------------------------------------------
 *
 *   out_q, out_k = the heads of q and k, after their norm where there is a weight, and after the rotary embedding where
 *   there are cos and sin
 *
 * q, out_q: [..., heads, head_dim]; k, v, out_k: [..., kv_heads, head_dim]; one dtype and the same leading dimensions,
 * those of the tokens; head_dim up to 1024, any strides but of the last dimension. cos, sin: [..., R], rows that were
 * gathered by position, of q's dtype or float32, R even and at most head_dim; columns from R on pass through. Leading
 * dimensions broadcast to the tokens', as in NumPy, or are these but for dimensions of 1. Norm weights: [head_dim], of
 * q's dtype or float32. out_q may be exactly q, and out_k exactly k; other overlap is refused.
 *
 * With the caches k and v go there, too. slots: int32 or int64, one for each token, [...], read when the kernel runs:
 * (block, row) as block * rows + row, where a block is a page, or without a layout of pages a sequence. A slot that is
 * negative or past the end of the cache is skipped. No two tokens of a call may have one slot. */
typedef struct {
    mv_call call;
    mv_view q, k, cos, sin, q_norm_weight, k_norm_weight;
    double eps, weight_offset;
    bool interleaved; /* as mv_decode_attention_args' */
    mv_rounding rounding;
    mv_view out_q, out_k;
    mv_view v, key_cache, value_cache, slots; /* all of them or none */
    mv_cache_layout cache_layout;
} mv_qk_norm_rope_args;

mv_status mv_qk_norm_rope(const mv_qk_norm_rope_args *args, mv_plan *plan, mv_error *error);

/* ---- greedy_tokens --------------------------------------------------------------------------------------------
 *
 *   out = pad where finished, else the index of the largest of the row's logits
 *   finished |= ends[out];  history[counts] = out;  counts += 1;  positions += 1
 *
 * Of equal logits the first counts, and NaN is larger than any other number, as in torch.argmax. logits:
 * [..., vocabulary], fewer than 2^31 columns, any strides of the leading dimensions, the last one contiguous. out:
 * int64 [...], one token for each row.
 *
 * What follows the choice is done where its tensors are given, in place; all but ends and pad have one number, or one
 * row of history, for each row of logits. finished: bool [...], ends: bool [vocabulary] and pad: int64 [] or [1], all
 * three or none; a pad outside of the vocabulary ends nothing. history: int64 [..., length] and counts: int64 [...],
 * both or none; a count outside of the history is not written there, and grows all the same. positions: int64 [...].
 * All are read when the kernel runs. What is written to must overlap nothing else. */
typedef struct {
    mv_call call;
    mv_view logits;
    mv_view finished, ends, pad;
    mv_view history, counts;
    mv_view positions;
    mv_view out;
} mv_greedy_tokens_args;

mv_status mv_greedy_tokens(const mv_greedy_tokens_args *args, mv_plan *plan, mv_error *error);

/* Every op, as OP(name, args): mv_<name>() takes an `args`. What the ops have in common is made from this list. */
#define MV_OPS(OP)                                                                                                     \
    OP(rms_norm, mv_rms_norm_args)                                                                                     \
    OP(add_rms_norm, mv_rms_norm_args)                                                                                 \
    OP(norm_add, mv_rms_norm_args)                                                                                     \
    OP(rms_norm_qkv, mv_rms_norm_qkv_args)                                                                             \
    OP(rms_norm_linear, mv_rms_norm_linear_args)                                                                       \
    OP(rms_norm_gate_up, mv_rms_norm_gate_up_args)                                                                     \
    OP(silu_and_mul, mv_act_and_mul_args)                                                                              \
    OP(gelu_and_mul, mv_act_and_mul_args)                                                                              \
    OP(linear, mv_linear_args)                                                                                         \
    OP(linear_add, mv_linear_args)                                                                                     \
    OP(decode_attention, mv_decode_attention_args)                                                                     \
    OP(qk_norm_rope, mv_qk_norm_rope_args)                                                                             \
    OP(greedy_tokens, mv_greedy_tokens_args)

/* ---- what exists, what ran ------------------------------------------------------------------------------------ */

typedef struct {
    const char *op, *name, *isa;
    mv_dtype dtype; /* of x */
    bool usable;
    char why_not[192]; /* empty when usable */
} mv_kernel_info;

/* The rows of all ops, by index from 0; false past the end. May initialise CUDA when the build has it. */
bool mv_kernel_at(int index, mv_kernel_info *info);

/* The last kernel that ran in this thread, or false when none did. */
typedef struct {
    const char *op, *name;
    char why[192];
} mv_ran;
bool mv_last_kernel(mv_ran *ran);

/* ---- the CPU backend ------------------------------------------------------------------------------------------ */

/* Threads used by CPU kernels. Default: the cores this process may run on, or OMP_NUM_THREADS when that is less.
 * Setting n < 1 brings the default back; more than the cores this process may run on is allowed, MV_MAX_THREADS at
 * most. */
enum { MV_MAX_THREADS = 1024 };
void mv_set_num_threads(int n);
int mv_get_num_threads(void);

/* Threads that another library keeps, such as the OpenMP of a framework: run() calls fn(argument) on `count` of them or
 * fewer, the calling one among them, and returns when all have; number() says which of them calls it, from 0 on, and
 * size() how many the library itself would take. */
typedef struct {
    void (*run)(void (*fn)(void *argument), void *argument, unsigned count, unsigned zero); /* as GOMP_parallel */
    int (*number)(void), (*size)(void);                                                     /* as of OpenMP */
} mv_team;

/* What the calling thread runs on the CPU from now on is computed by this team, as many of it as mv_set_num_threads()
 * says, by default all; NULL: by threads of our own again. Threads that a library leaves spinning would share their
 * cores with ours. In a child of fork there is no team. */
void mv_use_team(const mv_team *team);

/* Names of the instruction sets the kernels may use here, such as "avx2 avx512 avx512bf16 amx", separated by spaces. */
const char *mv_cpu_features(void);

/* ---- the CUDA backend; in a build without it each returns MV_DEVICE_ERROR and says how to get one ---------------- */

typedef struct {
    char name[128];
    int32_t compute_capability; /* 90 for 9.0 */
    int32_t sm_count;
    int32_t driver_version, runtime_version; /* 13000 for 13.0 */
    int64_t total_memory_bytes, l2_bytes;
    bool usable;              /* this build has code for it    */
    bool programmatic_launch; /* and the code uses programmatic dependent launch there */
} mv_cuda_info;

const char *mv_cuda_archs(void); /* such as "sm_80 compute_80 sm_90a"; "" in a build without CUDA */
mv_status mv_cuda_device_count(int32_t *count, mv_error *error);
mv_status mv_cuda_device_info(int32_t device, mv_cuda_info *info, mv_error *error);

/* Device memory for DeviceArray: allocated and freed in the order of the legacy default stream of that device. */
mv_status mv_cuda_malloc(int32_t device, size_t bytes, void **data, mv_error *error);
mv_status mv_cuda_free(int32_t device, void *data, mv_error *error);
/* Copies between host and device or on the device, on `stream`; waits until a copy from or to the host is done. */
mv_status mv_cuda_copy(int32_t device, void *to, const void *from, size_t bytes, void *stream, mv_error *error);
/* Makes `waiting` wait for what `producing` was given so far. */
mv_status mv_cuda_stream_wait(int32_t device, void *waiting, void *producing, mv_error *error);
mv_status mv_cuda_synchronize(int32_t device, void *stream, mv_error *error);
/* Launches a kernel that does nothing, on the legacy default stream: what any launch costs. */
mv_status mv_cuda_launch_nothing(int32_t device, mv_error *error);
/* The GPU that a device pointer belongs to: for protocols that do not say. */
mv_status mv_cuda_pointer_device(const void *data, int32_t *device, mv_error *error);

#ifdef __cplusplus
}
#endif
#endif

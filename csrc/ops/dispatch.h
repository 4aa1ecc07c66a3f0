/* dispatch.h: the list of kernels of an op, and the choice among them. */
#ifndef MV_DISPATCH_H
#define MV_DISPATCH_H

#include "../kernel.h"

/* One kernel. To add one: write it in its own file, then add its row to the list of its op. */
typedef struct {
    const char *name; /* <dtype>[_<variant>]_<isa> */
    const char *isa;
    mv_device_kind backend;
    mv_dtype dtype;
    int32_t oldest, newest; /* compute capabilities that can run it; 0 on the CPU */
    bool batch_invariant;   /* a row's bits do not depend on the number of rows   */
    mv_decide *decide;
    mv_kernel *run;
} mv_row;

/* Of ops that memory bounds: their rows can serve any task, and on one machine the widest registers win at every shape.
 * In greedy_tokens they do not on Zen 4, whose units are 256 bits wide: there AVX2 is faster than AVX-512. The prices
 * only order the rows. */
mv_decide mv_decide_wide, mv_decide_wide_except_zen4, mv_decide_half, mv_decide_scalar;

/* The rows of a list that may run here, by backend and by the dtype of x, as bits. 0: not asked yet. */
typedef struct {
    uint64_t bits[2][3];
} mv_usable_rows;

typedef struct {
    const char *op;
    const mv_row *rows;
    int count;
    mv_usable_rows *usable;
} mv_list;

/* The list of the table `rows`. */
#define MV_LIST(op, rows)                                                                                              \
    {op, rows, sizeof(rows) / sizeof((rows)[0]), &(mv_usable_rows){{{0}}}};                                            \
    _Static_assert(sizeof(rows) / sizeof((rows)[0]) <= 64, "a list has more rows than bits")

/* The lists are macros of rows: K(op, dtype, DTYPE, name, isa, runs_on, invariant, decide) each. These two meanings of
 * K declare the kernels and fill the table. A build or machine without a backend has no rows of it. */
#define MV_DECLARE_KERNEL(op, dtype, DTYPE, name, isa, runs_on, invariant, decide) mv_kernel mv_##op##_##dtype##_##name;
#define MV_TABLE_ROW(op, dtype, DTYPE, name, isa, runs_on, invariant, decide)                                          \
    {#dtype "_" #name, #isa, runs_on, DTYPE, isa##_CAPABILITIES, invariant, decide, mv_##op##_##dtype##_##name},
#define MV_ALL_DTYPES(K, op, ...)                                                                                      \
    K(op, f32, MV_F32, __VA_ARGS__) K(op, f16, MV_F16, __VA_ARGS__) K(op, bf16, MV_BF16, __VA_ARGS__)
#define MV_16BIT_DTYPES(K, op, ...) K(op, f16, MV_F16, __VA_ARGS__) K(op, bf16, MV_BF16, __VA_ARGS__)

/* The compute capabilities of an isa: from the first to the last. */
#define sm80_CAPABILITIES 80, INT32_MAX
#define sm90a_CAPABILITIES 90, 90
#define portable_CAPABILITIES 0, 0
#define avx2_CAPABILITIES 0, 0
#define avx512_CAPABILITIES 0, 0
#define avx512bf16_CAPABILITIES 0, 0
#define amx_CAPABILITIES 0, 0
#define neon_CAPABILITIES 0, 0

#if defined(__x86_64__)
#define MV_X86(...) __VA_ARGS__
#else
#define MV_X86(...)
#endif
#if defined(__aarch64__)
#define MV_ARM64(...) __VA_ARGS__
#else
#define MV_ARM64(...)
#endif
#ifdef MV_WITH_CUDA
#define MV_GPU(...) __VA_ARGS__
#else
#define MV_GPU(...)
#endif

/* Fills in what a task must know of its device, or says why no kernel can run there. */
mv_status mv_bind_device(const char *op, mv_task *task, mv_error *error);

/* Refuses a name that no row has; NULL is fine. */
mv_status mv_check_kernel_name(const mv_list *list, const char *op, const char *name, mv_error *error);

typedef struct {
    const mv_row *row;
    bool forced; /* by its name */
    mv_decision decision;
} mv_choice;

/* The row for a task: the one named `forced`, or the cheapest that fits. tokens: of the whole call, which the task may
 * be a piece of: its price decides, so that all pieces go to one kernel, the one of a call in a single piece. */
mv_status mv_choose(const mv_list *list, const char *op, const mv_task *task, int64_t tokens, const char *forced,
                    mv_choice *choice, mv_error *error);

/* Runs a row and remembers, for this thread, that it did and why. */
mv_status mv_run_row(const char *op, const mv_choice *choice, const mv_task *task, mv_error *error);

extern const mv_list mv_rms_norm_list, mv_rms_norm_qkv_list, mv_act_and_mul_list, mv_decode_attention_list,
    mv_qk_norm_rope_list, mv_greedy_tokens_list;
/* Ops whose kernels are those of another one. */
#define mv_add_rms_norm_list mv_rms_norm_list
#define mv_norm_add_list mv_rms_norm_list
#define mv_rms_norm_linear_list mv_rms_norm_qkv_list
#define mv_rms_norm_gate_up_list mv_rms_norm_qkv_list
#define mv_silu_and_mul_list mv_act_and_mul_list
#define mv_gelu_and_mul_list mv_act_and_mul_list
#define mv_linear_list mv_rms_norm_qkv_list
#define mv_linear_add_list mv_rms_norm_qkv_list

#endif

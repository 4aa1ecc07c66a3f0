/* rms_norm_qkv.c: RMSNorm and the q/k/v projection: what it requires, and its kernels. */
#include <limits.h>

#include "../cpu/cpu.h"
#include "norm_linear.h"
#ifdef MV_WITH_CUDA
#include "../cuda/cuda.h"
#endif

/* ---- the kernels ---------------------------------------------------------------------------------------------- */

/*                      name, isa, backend, batch invariant, decide */
#define RMS_NORM_QKV_KERNELS(K)                                                                                        \
    MV_GPU(MV_ALL_DTYPES(K, linear, decode_sm80, sm80, MV_CUDA, false, mv_decode_sm80_decide))                         \
    MV_GPU(MV_ALL_DTYPES(K, linear, decode_sm90a, sm90a, MV_CUDA, false, mv_decode_sm90a_decide))                      \
    MV_GPU(MV_ALL_DTYPES(K, linear, decode_heads_sm90a, sm90a, MV_CUDA, false, mv_decode_heads_sm90a_decide))          \
    MV_GPU(MV_16BIT_DTYPES(K, linear, norm_mma_sm80, sm80, MV_CUDA, true, mv_norm_mma_sm80_decide))                    \
    MV_GPU(MV_16BIT_DTYPES(K, linear, norm_wgmma_sm90a, sm90a, MV_CUDA, true, mv_norm_wgmma_sm90a_decide))             \
    MV_GPU(K(linear, bf16, MV_BF16, wgmma_sm90a, sm90a, MV_CUDA, false, mv_wgmma_sm90a_decide))                        \
    MV_GPU(K(linear, f32, MV_F32, norm_few_sm80, sm80, MV_CUDA, true, mv_norm_few_sm80_decide))                        \
    MV_GPU(K(linear, f32, MV_F32, norm_3xtf32_sm90a, sm90a, MV_CUDA, true, mv_norm_3xtf32_sm90a_decide))               \
    MV_GPU(MV_ALL_DTYPES(K, linear, ffma_sm80, sm80, MV_CUDA, false, mv_ffma_sm80_decide))                             \
    MV_GPU(MV_ALL_DTYPES(K, linear, norm_ffma_sm80, sm80, MV_CUDA, true, mv_norm_ffma_sm80_decide))                    \
    MV_X86(K(linear, bf16, MV_BF16, decode_avx512bf16, avx512bf16, MV_CPU, false, mv_decode_avx512bf16_decide))        \
    MV_X86(K(linear, bf16, MV_BF16, prefill_amx, amx, MV_CPU, true, mv_prefill_amx_decide))                            \
    MV_X86(K(linear, bf16, MV_BF16, prefill_avx512bf16, avx512bf16, MV_CPU, true, mv_prefill_avx512bf16_decide))       \
    MV_X86(MV_ALL_DTYPES(K, linear, decode_avx512, avx512, MV_CPU, false, mv_decode_avx512_decide))                    \
    MV_X86(MV_ALL_DTYPES(K, linear, prefill_avx512, avx512, MV_CPU, true, mv_prefill_avx512_decide))                   \
    MV_X86(MV_ALL_DTYPES(K, linear, decode_avx2, avx2, MV_CPU, false, mv_decode_avx2_decide))                          \
    MV_ARM64(MV_ALL_DTYPES(K, linear, decode_neon, neon, MV_CPU, false, mv_decode_neon_decide))                        \
    MV_X86(MV_ALL_DTYPES(K, linear, prefill_avx2, avx2, MV_CPU, true, mv_prefill_avx2_decide))                         \
    MV_ARM64(MV_ALL_DTYPES(K, linear, prefill_neon, neon, MV_CPU, true, mv_prefill_neon_decide))                       \
    MV_ALL_DTYPES(K, linear, decode_portable, portable, MV_CPU, false, mv_decode_portable_decide)                      \
    MV_ALL_DTYPES(K, linear, prefill_portable, portable, MV_CPU, true, mv_prefill_portable_decide)

RMS_NORM_QKV_KERNELS(MV_DECLARE_KERNEL)
static const mv_row rows[] = {RMS_NORM_QKV_KERNELS(MV_TABLE_ROW)};
const mv_list mv_rms_norm_qkv_list = MV_LIST("rms_norm_qkv", rows);

/* ---- the weights: q, k and v ----------------------------------------------------------------------------------- */

static const mv_linear_names names = {.weight = "qkv_weight",
                                      .weights = {"qkv_weight[0]", "qkv_weight[1]", "qkv_weight[2]"},
                                      .bias = "bias",
                                      .biases = {"bias[0]", "bias[1]", "bias[2]"},
                                      .outputs = "qkv",
                                      .bias_size = "= the outputs of qkv_weight",
                                      .most = 3};

static mv_status check_count(const char *op, const char *name, int64_t count, int64_t least, mv_error *error) {
    MV_REQUIRE(count >= least, MV_BAD_VALUE, "%s: %s is %lld, expected at least 1", op, name, (long long)count);
    MV_REQUIRE(count <= INT_MAX, MV_BAD_VALUE, "%s: %s is %lld, expected at most %d", op, name, (long long)count,
               INT_MAX);
    return MV_OK;
}

static mv_status check_heads(const char *op, const mv_rms_norm_qkv_args *a, mv_error *error) {
    MV_TRY(check_count(op, "num_heads", a->num_heads, 1, error));
    MV_TRY(check_count(op, "num_kv_heads", a->num_kv_heads, 1, error));
    return check_count(op, "head_dim", a->head_dim, 0, error); /* 0: not given */
}

/* For a refusal: would the weights fit with the counts the other way round? */
static bool counts_are_swapped(const mv_rms_norm_qkv_args *a, const mv_layer *layer) {
    const int64_t heads = a->num_kv_heads, kv_heads = a->num_heads, total = heads + 2 * kv_heads;
    if (heads == kv_heads || layer->outputs % total != 0) return false;
    const int64_t head_dim = layer->outputs / total;
    return (a->head_dim == 0 || a->head_dim == head_dim) &&
           (layer->blocks == 1 ||
            (layer->block[0].outputs == heads * head_dim && layer->block[1].outputs == kv_heads * head_dim));
}

/* Three blocks, however the weights were given. */
static mv_status read_projection(const mv_linear_views *views, const mv_rms_norm_qkv_args *a, int64_t hidden,
                                 mv_layer *layer, mv_error *error) {
    MV_TRY(mv_read_weights(views, hidden, layer, error));
    const char *op = views->op;
    const char *hint = counts_are_swapped(a, layer) ? "; are num_heads and num_kv_heads swapped?" : "";
    const int64_t total_heads = a->num_heads + 2 * a->num_kv_heads;
    MV_REQUIRE(layer->outputs > 0 && layer->outputs % total_heads == 0, MV_BAD_VALUE,
               "%s: qkv_weight has %lld outputs, expected a multiple of %lld (= num_heads + 2 * num_kv_heads)%s", op,
               (long long)layer->outputs, (long long)total_heads, hint);
    const int64_t head_dim = layer->outputs / total_heads;
    MV_REQUIRE(a->head_dim == 0 || a->head_dim == head_dim, MV_BAD_VALUE,
               "%s: head_dim is %lld, expected %lld (= %lld outputs of qkv_weight / (num_heads + 2 * num_kv_heads))",
               op, (long long)a->head_dim, (long long)head_dim, (long long)layer->outputs);
    const int64_t kv_size = a->num_kv_heads * head_dim, sizes[] = {a->num_heads * head_dim, kv_size, kv_size};
    for (int i = 0; layer->blocks == 3 && i < 3; i++)
        MV_REQUIRE(layer->block[i].outputs == sizes[i], MV_BAD_VALUE,
                   "%s: %s has %lld outputs, expected %lld (= %s * head_dim, where head_dim is %lld)%s", op,
                   names.weights[i], (long long)layer->block[i].outputs, (long long)sizes[i],
                   i == 0 ? "num_heads" : "num_kv_heads", (long long)head_dim, hint);
    if (layer->blocks == 1) mv_cut_weight(layer, 3, sizes);
    return mv_read_biases(views, layer, error);
}

/* ---- the op --------------------------------------------------------------------------------------------------- */

mv_status mv_rms_norm_qkv(const mv_rms_norm_qkv_args *a, mv_plan *plan, mv_error *error) {
    const mv_norm_linear all = MV_NORM_LINEAR(a->call.op ? a->call.op : "rms_norm_qkv", a, mv_rms_norm_qkv_list);
    const mv_linear_views views = {all.op, &names, &a->x, a->qkv_weight, a->bias, a->weight_layout};
    mv_layer layer = {0};
    MV_TRY(check_heads(all.op, a, error));
    MV_TRY(mv_check_norm_inputs(&all, error));
    MV_TRY(read_projection(&views, a, a->x.shape[a->x.ndim - 1], &layer, error));
    return mv_plan_norm_linear(&all, &views, &layer, plan, error);
}

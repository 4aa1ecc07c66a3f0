/* rms_norm_qkv.c: RMSNorm and the q/k/v projection: what it requires, and its kernels. */
#include <limits.h>

#include "../cpu/cpu.h"
#include "plan.h"
#ifdef MV_WITH_CUDA
#include "../cuda/cuda.h"
#endif

/* ---- the kernels ---------------------------------------------------------------------------------------------- */

/*                      name, isa, backend, batch invariant, decide */
#define RMS_NORM_QKV_KERNELS(K)                                                                                        \
    MV_GPU(MV_ALL_DTYPES(K, rms_norm_qkv, decode_sm80, sm80, MV_CUDA, false, mv_decode_sm80_decide))                   \
    MV_GPU(MV_ALL_DTYPES(K, rms_norm_qkv, decode_sm90a, sm90a, MV_CUDA, false, mv_decode_sm90a_decide))                \
    MV_GPU(MV_ALL_DTYPES(K, rms_norm_qkv, decode_heads_sm90a, sm90a, MV_CUDA, false, mv_decode_heads_sm90a_decide))    \
    MV_GPU(MV_16BIT_DTYPES(K, rms_norm_qkv, norm_mma_sm80, sm80, MV_CUDA, true, mv_norm_mma_sm80_decide))              \
    MV_GPU(MV_16BIT_DTYPES(K, rms_norm_qkv, norm_wgmma_sm90a, sm90a, MV_CUDA, true, mv_norm_wgmma_sm90a_decide))       \
    MV_GPU(K(rms_norm_qkv, bf16, MV_BF16, wgmma_sm90a, sm90a, MV_CUDA, false, mv_wgmma_sm90a_decide))                  \
    MV_GPU(K(rms_norm_qkv, f32, MV_F32, norm_few_sm80, sm80, MV_CUDA, true, mv_norm_few_sm80_decide))                  \
    MV_GPU(K(rms_norm_qkv, f32, MV_F32, norm_3xtf32_sm90a, sm90a, MV_CUDA, true, mv_norm_3xtf32_sm90a_decide))         \
    MV_GPU(MV_ALL_DTYPES(K, rms_norm_qkv, ffma_sm80, sm80, MV_CUDA, false, mv_ffma_sm80_decide))                       \
    MV_GPU(MV_ALL_DTYPES(K, rms_norm_qkv, norm_ffma_sm80, sm80, MV_CUDA, true, mv_norm_ffma_sm80_decide))              \
    MV_X86(K(rms_norm_qkv, bf16, MV_BF16, decode_avx512bf16, avx512bf16, MV_CPU, false, mv_decode_avx512bf16_decide))  \
    MV_X86(K(rms_norm_qkv, bf16, MV_BF16, prefill_avx512bf16, avx512bf16, MV_CPU, true, mv_prefill_avx512bf16_decide)) \
    MV_X86(MV_ALL_DTYPES(K, rms_norm_qkv, decode_avx512, avx512, MV_CPU, false, mv_decode_avx512_decide))              \
    MV_X86(MV_ALL_DTYPES(K, rms_norm_qkv, prefill_avx512, avx512, MV_CPU, true, mv_prefill_avx512_decide))             \
    MV_X86(MV_ALL_DTYPES(K, rms_norm_qkv, decode_avx2, avx2, MV_CPU, false, mv_decode_avx2_decide))                    \
    MV_X86(MV_ALL_DTYPES(K, rms_norm_qkv, prefill_avx2, avx2, MV_CPU, true, mv_prefill_avx2_decide))                   \
    MV_ALL_DTYPES(K, rms_norm_qkv, decode_portable, portable, MV_CPU, false, mv_decode_portable_decide)                \
    MV_ALL_DTYPES(K, rms_norm_qkv, prefill_portable, portable, MV_CPU, true, mv_prefill_portable_decide)

RMS_NORM_QKV_KERNELS(MV_DECLARE_KERNEL)
static const mv_row rows[] = {RMS_NORM_QKV_KERNELS(MV_TABLE_ROW)};
const mv_list mv_rms_norm_qkv_list = {"rms_norm_qkv", rows, sizeof rows / sizeof rows[0]};

/* ---- the weights: one matrix or three, in either layout --------------------------------------------------------- */

typedef struct {
    mv_block block[3]; /* q, k, v */
    mv_dtype weight_dtype[3];
    int64_t qkv, head_dim;
    bool packed;
} mv_projection;

static bool is_tuple(const mv_view view[3]) { return mv_present(&view[1]) || mv_present(&view[2]); }

static const char *const weight_names[] = {"qkv_weight[0]", "qkv_weight[1]", "qkv_weight[2]"};
static const char *const bias_names[] = {"bias[0]", "bias[1]", "bias[2]"};

static mv_named weight_at(const char *op, const mv_rms_norm_qkv_args *a, int i) {
    return (mv_named){op, is_tuple(a->qkv_weight) ? weight_names[i] : "qkv_weight", &a->qkv_weight[i]};
}
static mv_named bias_at(const char *op, const mv_rms_norm_qkv_args *a, int i) {
    return (mv_named){op, is_tuple(a->bias) ? bias_names[i] : "bias", &a->bias[i]};
}

/* What a matrix's shape alone says: AUTO where it is square and fits both ways. */
static mv_status layout_by_shape(mv_named w, int64_t hidden, mv_weight_layout *layout, mv_error *error) {
    const mv_view *v = w.view;
    const bool out_in = v->shape[1] == hidden, in_out = v->shape[0] == hidden;
    MV_REQUIRE(out_in || in_out, MV_BAD_VALUE,
               "%s: %s has shape %s, expected [qkv, %lld] (as nn.Linear keeps it) or its transpose (x.shape[-1] is "
               "%lld)",
               w.op, w.name, mv_shape_text(v).text, (long long)hidden, (long long)hidden);
    *layout = out_in && in_out ? MV_LAYOUT_AUTO : out_in ? MV_LAYOUT_OUT_IN : MV_LAYOUT_IN_OUT;
    return MV_OK;
}

/* The layout of all members: as told, else as any non-square member says. Strides do not tell: a square matrix whose
 * columns are contiguous may be a .t() view, or a Linear's weight that came out of Fortran order. */
static mv_status common_layout(const char *op, const mv_rms_norm_qkv_args *a, int members, int64_t hidden,
                               mv_weight_layout *common, mv_error *error) {
    *common = a->weight_layout;
    for (int i = 0; i < members; i++) {
        const mv_named w = weight_at(op, a, i);
        mv_weight_layout layout = MV_LAYOUT_AUTO;
        MV_TRY(layout_by_shape(w, hidden, &layout, error));
        if (layout == MV_LAYOUT_AUTO) continue;
        MV_REQUIRE(*common == MV_LAYOUT_AUTO || *common == layout, MV_BAD_VALUE,
                   "%s: %s has shape %s, which does not fit the layout that %s (x.shape[-1] is %lld)", op, w.name,
                   mv_shape_text(w.view).text,
                   a->weight_layout == MV_LAYOUT_AUTO ? "the other weights have" : "weight_layout names",
                   (long long)hidden);
        *common = layout;
    }
    MV_REQUIRE(*common != MV_LAYOUT_AUTO, MV_BAD_VALUE,
               "%s: qkv_weight %s square (%s), so it could be [qkv, hidden] or [hidden, qkv]; pass "
               "weight_layout=\"out_in\" for a Linear's .weight, \"in_out\" for its .t()",
               op, members > 1 ? "has only members that are" : "is", mv_shape_text(&a->qkv_weight[0]).text);
    return MV_OK;
}

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

static const char *bytes_at(const void *data, int64_t elements, mv_dtype dtype) {
    return (const char *)data + elements * (int64_t)mv_dtype_bytes(dtype);
}

/* For a refusal: would the weights fit with the counts the other way round? */
static bool counts_are_swapped(const mv_rms_norm_qkv_args *a, const mv_block *member, int members, int64_t qkv) {
    const int64_t heads = a->num_kv_heads, kv_heads = a->num_heads, total = heads + 2 * kv_heads;
    if (heads == kv_heads || qkv % total != 0) return false;
    const int64_t head_dim = qkv / total;
    return (a->head_dim == 0 || a->head_dim == head_dim) &&
           (members == 1 || (member[0].outputs == heads * head_dim && member[1].outputs == kv_heads * head_dim));
}

/* Reads the weights: three blocks, however they were given. */
static mv_status read_weights(const char *op, const mv_rms_norm_qkv_args *a, int64_t hidden, mv_projection *p,
                              mv_error *error) {
    const bool tuple = is_tuple(a->qkv_weight);
    const int members = tuple ? 3 : 1;
    for (int i = 0; i < members; i++) {
        const mv_named w = weight_at(op, a, i);
        MV_REQUIRE(mv_present(w.view), MV_BAD_VALUE, "%s: %s is missing", op, w.name);
        MV_TRY(mv_check_parameter(w, &a->x, error));
        MV_REQUIRE(w.view->ndim == 2, MV_BAD_VALUE, "%s: %s has shape %s, expected a matrix", op, w.name,
                   mv_shape_text(w.view).text);
    }
    mv_weight_layout common;
    MV_TRY(common_layout(op, a, members, hidden, &common, error));

    mv_block member[3];
    p->qkv = 0;
    for (int i = 0; i < members; i++) {
        const mv_named w = weight_at(op, a, i);
        const int out_dim = common == MV_LAYOUT_OUT_IN ? 0 : 1;
        member[i] = (mv_block){.weight = w.view->data,
                               .outputs = w.view->shape[out_dim],
                               .row_stride = mv_stride(w.view, out_dim),
                               .col_stride = hidden == 1 ? 1 : mv_stride(w.view, 1 - out_dim)};
        p->qkv += member[i].outputs;
    }

    const char *hint =
        counts_are_swapped(a, member, members, p->qkv) ? "; are num_heads and num_kv_heads swapped?" : "";
    const int64_t total_heads = a->num_heads + 2 * a->num_kv_heads;
    const mv_named whole = {op, "qkv_weight", &a->qkv_weight[0]};
    MV_REQUIRE(p->qkv > 0 && p->qkv % total_heads == 0, MV_BAD_VALUE,
               "%s: %s has %lld outputs, expected a multiple of %lld (= num_heads + 2 * num_kv_heads)%s", op,
               whole.name, (long long)p->qkv, (long long)total_heads, hint);
    p->head_dim = p->qkv / total_heads;
    MV_REQUIRE(a->head_dim == 0 || a->head_dim == p->head_dim, MV_BAD_VALUE,
               "%s: head_dim is %lld, expected %lld (= %lld outputs of qkv_weight / (num_heads + 2 * num_kv_heads))",
               op, (long long)a->head_dim, (long long)p->head_dim, (long long)p->qkv);

    const int64_t outputs[] = {a->num_heads * p->head_dim, a->num_kv_heads * p->head_dim,
                               a->num_kv_heads * p->head_dim};
    int64_t first = 0;
    p->packed = true;
    for (int i = 0; i < 3; i++) {
        const mv_dtype dtype = a->qkv_weight[tuple ? i : 0].dtype;
        if (tuple) {
            MV_REQUIRE(member[i].outputs == outputs[i], MV_BAD_VALUE,
                       "%s: %s has %lld outputs, expected %lld (= %s * head_dim, where head_dim is %lld)%s", op,
                       weight_names[i], (long long)member[i].outputs, (long long)outputs[i],
                       i == 0 ? "num_heads" : "num_kv_heads", (long long)p->head_dim, hint);
            p->block[i] = member[i];
        } else {
            p->block[i] = member[0];
            p->block[i].weight = bytes_at(member[0].weight, first * member[0].row_stride, dtype);
            p->block[i].outputs = outputs[i];
        }
        p->weight_dtype[i] = dtype;
        p->packed = p->packed && dtype == p->weight_dtype[0] && p->block[i].row_stride == p->block[0].row_stride &&
                    p->block[i].col_stride == p->block[0].col_stride &&
                    p->block[i].weight == bytes_at(p->block[0].weight, first * p->block[0].row_stride, dtype);
        first += outputs[i];
    }
    return MV_OK;
}

static mv_status read_bias(const char *op, const mv_rms_norm_qkv_args *a, mv_projection *p, mv_error *error) {
    const bool tuple = is_tuple(a->bias);
    if (!tuple && !mv_present(&a->bias[0])) return MV_OK;
    if (!tuple) MV_TRY(mv_check_vector(bias_at(op, a, 0), &a->x, p->qkv, "= the outputs of qkv_weight", error));
    int64_t first = 0;
    for (int i = 0; i < 3; i++) {
        const mv_named bias = bias_at(op, a, i);
        if (tuple) {
            MV_REQUIRE(mv_present(bias.view), MV_BAD_VALUE, "%s: %s is missing", op, bias.name);
            MV_TRY(mv_check_vector(bias, &a->x, p->block[i].outputs, "= the outputs of its weight", error));
        }
        const mv_view *view = tuple ? bias.view : &a->bias[0];
        p->block[i].bias = tuple ? view->data : bytes_at(view->data, first, view->dtype);
        p->block[i].bias_dtype = view->dtype;
        p->packed = p->packed && p->block[i].bias_dtype == p->block[0].bias_dtype &&
                    p->block[i].bias == bytes_at(p->block[0].bias, first, view->dtype);
        first += p->block[i].outputs;
    }
    return MV_OK;
}

/* ---- the op --------------------------------------------------------------------------------------------------- */

static mv_status check_inputs(const char *op, const mv_rms_norm_qkv_args *a, mv_projection *p, mv_error *error) {
    MV_TRY(mv_check_numbers(op, a->eps, a->weight_offset, a->rounding, error));
    MV_TRY(check_heads(op, a, error));
    MV_TRY(mv_check_x((mv_named){op, "x", &a->x}, error));
    const int64_t hidden = a->x.shape[a->x.ndim - 1];
    if (mv_present(&a->residual)) MV_TRY(mv_check_like_x((mv_named){op, "residual", &a->residual}, &a->x, error));
    MV_TRY(mv_check_vector((mv_named){op, "norm_weight", &a->norm_weight}, &a->x, hidden, "= x.shape[-1]", error));
    MV_TRY(read_weights(op, a, hidden, p, error));
    return read_bias(op, a, p, error);
}

static mv_status check_apart_from_inputs(mv_named out, const mv_rms_norm_qkv_args *a, mv_error *error) {
    if (!mv_present(out.view)) return MV_OK;
    MV_TRY(mv_check_apart(out, (mv_named){out.op, "x", &a->x}, false, error));
    MV_TRY(mv_check_apart(out, (mv_named){out.op, "residual", &a->residual}, false, error));
    MV_TRY(mv_check_apart(out, (mv_named){out.op, "norm_weight", &a->norm_weight}, false, error));
    for (int i = 0; i < 3; i++) {
        MV_TRY(mv_check_apart(out, weight_at(out.op, a, i), false, error));
        MV_TRY(mv_check_apart(out, bias_at(out.op, a, i), false, error));
    }
    return MV_OK;
}

/* No output may overlap anything else. */
static mv_status check_outputs(const char *op, const mv_rms_norm_qkv_args *a, int64_t qkv, mv_error *error) {
    const mv_named out = {op, "out", &a->out}, residual_out = {op, "residual_out", &a->residual_out};
    MV_TRY((mv_present(&a->out) ? mv_check_output : mv_check_fresh_output)(out, &a->x, qkv, error));
    MV_REQUIRE(!mv_present(&a->residual_out) || mv_present(&a->residual), MV_BAD_VALUE,
               "%s: residual_out was given without a residual", op);
    if (mv_present(&a->residual_out)) MV_TRY(mv_check_output(residual_out, &a->x, a->x.shape[a->x.ndim - 1], error));
    MV_TRY(check_apart_from_inputs(out, a, error));
    MV_TRY(check_apart_from_inputs(residual_out, a, error));
    return mv_check_apart(out, residual_out, false, error);
}

/* Weights of several dtypes, or some transposed and some not, are computed in parts that share both. */
static void add_blocks(mv_plan *plan, const mv_projection *p) {
    mv_task *task = &mv_state(plan)->part[0].task;
    int64_t first_output = 0;
    for (int i = 0, part = 0, blocks = 0; i < 3; i++) {
        const bool same = i == 0 || (p->weight_dtype[i] == p->weight_dtype[i - 1] &&
                                     (p->block[i].col_stride == 1) == (p->block[i - 1].col_stride == 1));
        if (!same) {
            task = mv_add_part(plan, ++part, first_output);
            blocks = 0;
        }
        task->linear.block[blocks++] = p->block[i];
        task->linear.outputs += p->block[i].outputs;
        task->linear.weight_dtype = p->weight_dtype[i];
        task->linear.packed = p->packed || blocks == 1;
        first_output += p->block[i].outputs;
    }
}

mv_status mv_rms_norm_qkv(const mv_rms_norm_qkv_args *a, mv_plan *plan, mv_error *error) {
    const char *op = a->call.op ? a->call.op : "rms_norm_qkv";
    mv_projection projection = {0};
    MV_TRY(check_inputs(op, a, &projection, error));
    MV_TRY(check_outputs(op, a, projection.qkv, error));
    plan->qkv = projection.qkv;
    plan->head_dim = projection.head_dim;
    const mv_row_views rows = {&a->x, &a->residual, &a->out, &a->residual_out, projection.qkv};
    MV_TRY(mv_start_plan(plan, &mv_rms_norm_qkv_list, op, &a->call, &rows, error));
    mv_task *task = &mv_state(plan)->part[0].task;
    task->norm.weight = a->norm_weight.data;
    task->norm.weight_dtype = a->norm_weight.dtype;
    task->norm.eps = (float)a->eps;
    task->norm.weight_offset = (float)a->weight_offset;
    task->rounding = a->rounding;
    task->batch_invariant = a->batch_invariant;
    task->linear.allow_tf32 = a->allow_tf32;
    task->static_weights = a->static_weights;
    if (mv_state(plan)->parts > 0) add_blocks(plan, &projection);
    return mv_finish_plan(plan, error);
}

/* qk_norm_rope_sm80.cu: the norm and the rotary embedding of the heads of q and k, on any GPU; with a cache k and v
 * also go to their token's slot.
 *
 * A block has the heads of a token, or with few tokens some of them, and a warp or a part of one a head: it is read
 * whole, made ready in registers, and written; so outputs may lie exactly on q and k. Who has a head of k writes the
 * cache's rows of it and of v, too. Nothing is read before the wait. */
#include "cuda/arch/launch.cuh"
#include "cuda/attention/head.cuh"

namespace {

/* Where the cache has the row of a token: of a page, or of a sequence. exists: the slot is one of the cache. */
struct CacheSlot {
    bool exists;
    int64_t block, row;
    __device__ __forceinline__ CacheSlot(const mv_task &task, int64_t token) : exists(false), block(0), row(0) {
        const mv_qk &qk = task.qk;
        if (!qk.slots.data) return;
        const int64_t slot = qk.wide_slots ? *row_address<const int64_t>(qk.slots, task.inner, token)
                                           : *row_address<const int32_t>(qk.slots, task.inner, token);
        block = slot / qk.block_rows;
        row = slot % qk.block_rows;
        exists = slot >= 0 && block < qk.blocks;
    }
    template <typename T> __device__ __forceinline__ T *of(const mv_cache &cache, int64_t head) const {
        return static_cast<T *>(cache.data) + block * cache.block_stride + row * cache.row_stride +
               head * cache.head_stride;
    }
};

/* The rows of cos and sin of a token, as rows 0. */
template <typename T> __device__ __forceinline__ mv_rotary rotary_of_token(const mv_task &task, int64_t token) {
    mv_rotary rotary = task.qk.rotary;
    if (rotary.columns == 0) return rotary;
    const auto row = [&](mv_rows rows) -> const void * {
        if (rotary.dtype == MV_F32) return row_address<const float>(rows, task.inner, token);
        return row_address<const T>(rows, task.inner, token);
    };
    rotary.cos = row(task.qk.cos);
    rotary.sin = row(task.qk.sin);
    return rotary;
}

/* Of each token there are `blocks` blocks. aligned: all rows can be read and written in the parts that a lane of an Own
 * has. */
template <typename T, class Own, int kMostThreads> __global__ void __launch_bounds__(kMostThreads)
    qk_norm_rope_kernel(const __grid_constant__ mv_task task, unsigned blocks, bool aligned) {
    extern __shared__ __align__(16) float smem[];
    const mv_qk &qk = task.qk;
    const int dim = static_cast<int>(task.hidden), own = threadIdx.x / Own::kLanes, owns = blockDim.x / Own::kLanes;
    const int64_t token = blockIdx.x / blocks, heads = qk.heads + qk.kv_heads;
    float *const exchange = smem + own * dim;
    griddepcontrol_wait();
    griddepcontrol_launch();
    const mv_rotary rotary = rotary_of_token<T>(task, token);
    const CacheSlot slot(task, token);

    const int of_warp = threadIdx.x / 32 * (32 / Own::kLanes); /* the first of those that its lanes have */
    for (int64_t first = blockIdx.x % blocks * owns; first + of_warp < heads; first += blocks * owns) {
        const bool exists = first + own < heads; /* else it goes along with those of its warp, for the sums */
        const int64_t head = exists ? first + own : heads - 1, kv_head = head - qk.heads;
        const bool is_q = kv_head < 0;
        const mv_head_norm &norm = is_q ? qk.q_norm : qk.k_norm;
        const T *x = is_q ? row_address<const T>(task.x, task.inner, token) + head * qk.q_stride
                          : row_address<const T>(qk.k, task.inner, token) + kv_head * qk.k_stride;
        T *out = is_q ? row_address<T>(task.out, task.inner, token) + head * qk.out_q_stride
                      : row_address<T>(qk.out_k, task.inner, token) + kv_head * qk.out_k_stride;
        Own values;
        values.load(x, dim, norm, rotary, 0, aligned);
        values.finish(dim, norm, rotary, task.rounding, exchange, dim);
        if (!exists) continue;
        values.store_row(out, dim, aligned);
        if (is_q || !slot.exists) continue;
        values.store_row(slot.of<T>(qk.keys, kv_head), dim, aligned);
        values.copy_row(slot.of<T>(qk.values, kv_head),
                        row_address<const T>(qk.v, task.inner, token) + kv_head * qk.v_stride, dim, aligned);
    }
}

/* Is a head turned whole, in halves, by rows of its own dtype? Its layout in memory does not matter. */
bool is_paired(const mv_task *task) {
    const mv_qk &qk = task->qk;
    const auto is_usual = [&](const mv_head_norm &norm) { return !norm.weight || norm.weight_dtype == task->dtype; };
    return qk.rotary.columns == task->hidden && qk.rotary.dtype == task->dtype && !qk.rotary.interleaved &&
           is_usual(qk.q_norm) && is_usual(qk.k_norm);
}

bool is_aligned(const mv_task *task) {
    const mv_qk &qk = task->qk;
    const size_t bytes = task->dtype == MV_F32 ? 4 : 2;
    const auto heads = [&](const mv_rows &rows, int64_t stride) {
        return rows_aligned16(rows, bytes) && stride * static_cast<int64_t>(bytes) % 16 == 0;
    };
    const auto cache = [&](const mv_cache &of) {
        return is_aligned16(of.data) && (of.block_stride | of.row_stride | of.head_stride) * bytes % 16 == 0;
    };
    return heads(task->x, qk.q_stride) && heads(qk.k, qk.k_stride) && heads(task->out, qk.out_q_stride) &&
           heads(qk.out_k, qk.out_k_stride) && heads(qk.v, qk.v_stride) && heads(qk.cos, 0) && heads(qk.sin, 0) &&
           is_aligned16(qk.q_norm.weight) && is_aligned16(qk.k_norm.weight) && cache(qk.keys) && cache(qk.values);
}

template <typename T, class Own, int kMostThreads>
mv_status run_with(const mv_task *task, bool aligned, size_t exchange_bytes, mv_error *error) {
    if (task->tokens > INT32_MAX)
        return mv_fail(error, MV_BAD_VALUE, "qk_norm_rope: q has %lld tokens, more than a GPU's grid takes",
                       static_cast<long long>(task->tokens));
    const int64_t lanes = (task->qk.heads + task->qk.kv_heads) * Own::kLanes;
    const int64_t turns = (lanes + kMostThreads - 1) / kMostThreads; /* of a block that has all heads of a token */
    const int64_t blocks = task->tokens * turns <= task->sm_count ? turns : 1;
    const int threads = static_cast<int>((lanes / turns + 31) / 32 * 32);
    const Grid grid = {static_cast<unsigned>(task->tokens * blocks), static_cast<unsigned>(threads),
                       threads / Own::kLanes * exchange_bytes};
    return launch<qk_norm_rope_kernel<T, Own, kMostThreads>>(task, grid, error, *task, static_cast<unsigned>(blocks),
                                                             aligned);
}

/* A lane of a paired head has a packet of 16 bytes of either half. */
template <typename T, int kDim> mv_status run_paired(const mv_task *task, mv_error *error) {
    constexpr int kPer = 2 * Packet<T>::size;
    return run_with<T, PairedHead<T, kPer, kDim / kPer>, 512>(task, is_aligned(task), 0, error);
}

template <typename T> mv_status run_heads(const mv_task *task, mv_error *error) {
    if (is_paired(task)) {
        if (task->hidden == 64) return run_paired<T, 64>(task, error);
        if (task->hidden == 128) return run_paired<T, 128>(task, error);
        if (task->hidden == 256) return run_paired<T, 256>(task, error);
    }
    const size_t exchange_bytes = static_cast<size_t>(task->hidden) * sizeof(float);
    return task->hidden <= 128   ? run_with<T, Head<T, 4>, 512>(task, false, exchange_bytes, error)
           : task->hidden <= 256 ? run_with<T, Head<T, 8>, 512>(task, false, exchange_bytes, error)
                                 : run_with<T, Head<T, 32>, 256>(task, false, exchange_bytes, error);
}

} // namespace

extern "C" mv_status mv_qk_norm_rope_f32_sm80(const mv_task *task, const mv_decision *, mv_error *error) {
    return run_heads<float>(task, error);
}
extern "C" mv_status mv_qk_norm_rope_f16_sm80(const mv_task *task, const mv_decision *, mv_error *error) {
    return run_heads<__half>(task, error);
}
extern "C" mv_status mv_qk_norm_rope_bf16_sm80(const mv_task *task, const mv_decision *, mv_error *error) {
    return run_heads<__nv_bfloat16>(task, error);
}

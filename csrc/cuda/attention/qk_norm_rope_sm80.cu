/* qk_norm_rope_sm80.cu: the norm and the rotary embedding of the heads of q and k, on any GPU; with a cache k and v
 * also go to their token's slot.
 *
 * A warp has a head of a token: it is read whole, made ready in shared memory, and written; so outputs may lie exactly
 * on q and k. The warp of a head of k writes the cache's rows of it and of v, too. Nothing is read before the wait. */
#include "cuda/arch/launch.cuh"
#include "cuda/attention/head.cuh"

namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32;

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

/* kPer: columns of a head that a lane has. Where they are at most 4, a thread may take no more registers than let an SM
 * hold 5 blocks. */
template <typename T, int kPer> __global__ void __launch_bounds__(kThreads, kPer <= 4 ? 5 : 1)
    qk_norm_rope_kernel(const __grid_constant__ mv_task task) {
    extern __shared__ __align__(16) float smem[];
    const mv_qk &qk = task.qk;
    const int dim = static_cast<int>(task.hidden), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t heads = qk.heads + qk.kv_heads, i = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
    griddepcontrol_wait();
    griddepcontrol_launch();
    if (i >= task.tokens * heads) return;

    const int64_t token = i / heads, head = i % heads, kv_head = head - qk.heads;
    const bool is_q = kv_head < 0;
    const T *x = is_q ? row_address<const T>(task.x, task.inner, token) + head * qk.q_stride
                      : row_address<const T>(qk.k, task.inner, token) + kv_head * qk.k_stride;
    T *out = is_q ? row_address<T>(task.out, task.inner, token) + head * qk.out_q_stride
                  : row_address<T>(qk.out_k, task.inner, token) + kv_head * qk.out_k_stride;
    float *y = smem + warp * dim;
    const mv_head_norm &norm = is_q ? qk.q_norm : qk.k_norm;
    const mv_rotary rotary = rotary_of_token<T>(task, token);
    Head<T, kPer> of;
    of.load(x, dim, norm, rotary, 0);
    of.finish(dim, norm, rotary, task.rounding, y, dim);
    for (int c = lane; c < dim; c += 32) out[c] = from_float<T>(y[c]);

    const CacheSlot slot(task, token);
    if (is_q || !slot.exists) return;
    const T *v = row_address<const T>(qk.v, task.inner, token) + kv_head * qk.v_stride;
    T *key = slot.of<T>(qk.keys, kv_head), *value = slot.of<T>(qk.values, kv_head);
    for (int c = lane; c < dim; c += 32) {
        key[c] = from_float<T>(y[c]);
        value[c] = v[c];
    }
}

template <typename T> mv_status run_heads(const mv_task *task, mv_error *error) {
    const int64_t heads = task->qk.heads + task->qk.kv_heads;
    if (task->tokens > static_cast<int64_t>(INT32_MAX) * kWarps / heads)
        return mv_fail(error, MV_BAD_VALUE, "qk_norm_rope: q has %lld tokens, more than a GPU's grid takes",
                       static_cast<long long>(task->tokens));
    const int64_t blocks = (task->tokens * heads + kWarps - 1) / kWarps;
    const Grid grid = {static_cast<unsigned>(blocks), kThreads,
                       static_cast<size_t>(kWarps * task->hidden) * sizeof(float)};
    return task->hidden <= 128   ? launch<qk_norm_rope_kernel<T, 4>>(task, grid, error, *task)
           : task->hidden <= 256 ? launch<qk_norm_rope_kernel<T, 8>>(task, grid, error, *task)
                                 : launch<qk_norm_rope_kernel<T, 32>>(task, grid, error, *task);
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

/* merge.cuh: where the blocks of decode attention leave what they have found of a piece of the keys, the
 * launch that merges it, and what the kernels ask on the host. */
#pragma once

#include "cuda/arch/launch.cuh"
#include "cuda/attention/keys.cuh"
#include "cuda/attention/softmax.cuh"
#include "cuda/decision.cuh"

namespace {

/* Where the workspace has the softmax of each (query head, piece). Its sum is 0 where the piece has no keys. */
struct Partials {
    float2 *found; /* m and sum p_j */
    float *out;    /* [dim]: sum p_j v_j */
    __device__ __forceinline__ Partials(const mv_task &task, int pieces)
        : found(static_cast<float2 *>(task.workspace)), out(reinterpret_cast<float *>(found + task.tokens * pieces)) {}
};

/* Does a second launch merge the pieces? */
__host__ __device__ __forceinline__ bool is_merged_later(const Cut &cut) { return cut.pieces > 1 && cut.cluster == 0; }

/* What a piece without keys leaves. Where the sequence is skipped, the first piece leaves a sum of 1, so that the
 * result is 0; where it cannot be served, all sums are 0, and the result is NaN. Where there is no second launch, the
 * first piece leaves the result: only a sequence without any keys may ask for it. */
template <typename T> __device__ __forceinline__ void write_empty(const mv_task &task, const Cut &cut, const Keys &keys,
                                                                  int sequence, int first_head, int group, int piece) {
    const int dim = static_cast<int>(task.hidden), threads = static_cast<int>(blockDim.x);
    const Partials partials(task, cut.pieces);
    const bool whole = !is_merged_later(cut);
    if (whole && piece > 0) return;
    for (int h = first_head; h < first_head + group; h++)
#pragma unroll 1
        for (int column = static_cast<int>(threadIdx.x); column < dim; column += threads) {
            if (whole) {
                head_address<T>(task, task.out, sequence, h)[column] = from_float<T>(keys.count < 0 ? NAN : 0);
                continue;
            }
            const int64_t place = (sequence * task.attention.heads + h) * cut.pieces + piece;
            partials.out[place * dim + column] = 0;
            if (column) continue;
            const bool is_zero = keys.count == 0 && piece == 0;
            partials.found[place] = {is_zero ? 0 : -INFINITY, is_zero ? 1.0f : 0.0f};
        }
}

constexpr int kMergeThreads = 128;
constexpr int kMergePieces = 16; /* that are loaded at a time */

/* Merges the pieces of a head into the result. */
template <typename T> __global__ void __launch_bounds__(kMergeThreads)
    merge_pieces_kernel(const __grid_constant__ mv_task task, Cut cut) {
    const int dim = static_cast<int>(task.hidden);
    const int64_t row = blockIdx.x, first = row * cut.pieces;
    const Partials partials(task, cut.pieces);
    griddepcontrol_launch(); /* at once: what the next kernel does before its own wait runs beside the attention */
    T *const to = row_address<T>(task.out, task.inner, row); /* its divisions are done before the wait */
    griddepcontrol_wait();
    for (int column = threadIdx.x; column < dim; column += kMergeThreads) {
        Softmax<1> all;
        const float2 *of_row = partials.found + first;
        const float *out_of_row = partials.out + first * dim + column;
        for (int begin = 0; begin < cut.pieces; begin += kMergePieces) {
            float2 found[kMergePieces];
            float out[kMergePieces], both = all.most;
#pragma unroll
            for (int p = 0; p < kMergePieces; p++) {
                const bool is_one = begin + p < cut.pieces;
                found[p] = is_one ? of_row[begin + p] : float2{-INFINITY, 0};
                out[p] = is_one ? out_of_row[(begin + p) * dim] : 0;
                both = fmaxf(both, found[p].x);
            }
            const float shrink = weight(all.most, both);
            all.most = both, all.sum *= shrink, all.out[0] *= shrink;
#pragma unroll
            for (int p = 0; p < kMergePieces; p++) {
                const float of_piece = weight(found[p].x, both);
                all.sum += of_piece * found[p].y;
                all.out[0] += of_piece * out[p];
            }
        }
        to[column] = from_float<T>(all.out[0] / all.sum);
    }
}

/* ---- host -------------------------------------------------------------------------------------------------------- */

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

/* The sequences that a cut is chosen for, and its price: how one is cut may depend on how many others there are only
 * where its bits may. */
int64_t priced_sequences(const mv_task *task) {
    return task->batch_invariant ? 1 : task->tokens / task->attention.heads;
}

/* The second launch, where there is one. */
template <typename T> mv_status launch_merge(const mv_task *task, const Cut &cut, mv_error *error) {
    if (!is_merged_later(cut)) return MV_OK;
    const Grid merge = {static_cast<unsigned>(task->tokens), kMergeThreads, 0};
    return launch<merge_pieces_kernel<T>>(task, merge, error, *task, cut);
}
size_t workspace_bytes(const mv_task *task, const Cut &cut) {
    if (!is_merged_later(cut)) return 0;
    return static_cast<size_t>(task->tokens * cut.pieces * (task->hidden + 2)) * sizeof(float);
}

/* A cut of so many query heads, whose pages are this long. */
Cut cut_of_heads(const mv_task *task, int64_t most_group) {
    const mv_attention &a = task->attention;
    const int64_t of_head = a.heads / a.kv_heads;
    Cut cut = {};
    cut.passes = static_cast<int32_t>(parts(of_head, most_group));
    cut.group = static_cast<int32_t>(parts(of_head, cut.passes));
    cut.of_head = static_cast<int32_t>(of_head);
    while ((int64_t{1} << cut.shift) < a.block_rows) cut.shift++;
    cut.reciprocal = (uint64_t{1} << (30 + cut.shift)) / static_cast<uint64_t>(a.block_rows) + 1;
    return cut;
}

bool cache_aligned(const mv_cache &cache, int64_t per_packet) {
    return is_aligned16(cache.data) && cache.block_stride % per_packet == 0 && cache.row_stride % per_packet == 0 &&
           cache.head_stride % per_packet == 0;
}

mv_status run_attention(const mv_task *task, const mv_decision *decision, mv_error *error) {
    const Cut cut = cut_of<Cut>(decision);
    const double blocks = static_cast<double>(task->tokens) * cut.passes * cut.pieces;
    if (blocks > INT32_MAX)
        return mv_fail(error, MV_BAD_VALUE, "decode_attention: q has %lld heads in all, more than a GPU's grid takes",
                       static_cast<long long>(task->tokens));
    return decision->launch(task, decision, error);
}

} // namespace

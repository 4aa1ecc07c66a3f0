/* few_sm80.cu: the projection of few tokens in float32 on the CUDA cores: the second launch of the plan
 * whose first is the norm kernel.
 *
 * Of few tokens there are too few outputs for all warps, so the warps of a CTA share hidden. A CTA owns a tile of
 * tokens x outputs and walks over hidden in steps of 128; of each step a warp multiplies its own 16 k of the whole
 * tile, from a ring of its own in shared memory, which it fills by cp.async: no warp waits for another until their sums
 * meet at the end.
 *
 * A thread sums the even and the odd k apart: half as long, a sum has less error, and a product's two operands that
 * change lie in different banks of registers more often.
 *
 * A ring's stage has 64 bytes of each row of the weight, then of x. Of eight neighbouring rows the chunks of 16 bytes
 * that lie above each other are in different banks: chunk c of row r is at c ^ (r / 2 % 4).
 *
 * An output's bits do not depend on the number of tokens: every tile adds the same products in the same order. */
#include "cuda/arch/launch.cuh"
#include "cuda/arch/mma.cuh"
#include "cuda/arch/ptx.cuh"
#include "cuda/arch/reduce.cuh"
#include "cuda/arch/vec.cuh"
#include "cuda/cuda.h"
#include "cuda/linear/epilogue.cuh"
#include "cuda/linear/plan.cuh"
#include "cuda/linear/token_tile.cuh"
#include "cuda/prices/linear.cuh"

namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kChunks = 4, kRowBytes = 16 * kChunks; /* of a row, a warp and a step */
constexpr int kWarpK = 4 * kChunks, kStep = kWarps * kWarpK;
constexpr int kMinStages = 3, kMaxStages = 8;

/* The lanes of a warp are 4 x 8: a lane has tokens lane / 8 + 4 i and outputs lane % 8 + 8 j. */
template <int kOwnTokens, int kOwnOutputs> struct FewTile {
    static constexpr int own_m = kOwnTokens, own_n = kOwnOutputs, M = 4 * own_m, N = 8 * own_n, rows = M + N;
    static constexpr int stage_bytes = rows * kRowBytes;
    static constexpr int pitch = N % 16 ? N : N + 8;   /* of the sums: lanes write to 32 different banks */
    static constexpr int together = own_m % 4 ? 2 : 4; /* tokens whose products take turns */
    static_assert(M % 8 == 0);
    static_assert(M * pitch * 4 <= kMinStages * stage_bytes, "a warp's sums take the place of its ring");
};

/* Rows of the weight, then of x. Those past the end repeat the first one of the tile: what they give is not stored.
 * prefetched: columns of the weight that L2 is asked for where they may not be read yet. */
template <typename Tile> struct FewRows {
    const float *row[Tile::rows];
    float bias[Tile::N];
};

template <typename Tile> __device__ __forceinline__ void find_few_rows(const mv_task &task, TilePlace tile,
                                                                       FewRows<Tile> *fixed, int64_t prefetched) {
    const int64_t tokens = task.tokens - tile.first_token, outputs = task.linear.outputs - tile.first_output;
    for (int row = threadIdx.x; row < Tile::rows; row += kThreads) {
        const int n = row, m = row - Tile::N;
        if (n < Tile::N) {
            fixed->row[row] = weight_row<float>(task, find_output(task, tile.first_output + (n < outputs ? n : 0)));
            if (!task.static_weights) prefetch_l2(fixed->row[row], min(task.hidden, prefetched) * 4);
        } else {
            fixed->row[row] =
                static_cast<const float *>(task.x.data) + (tile.first_token + (m < tokens ? m : 0)) * task.hidden;
        }
    }
}

template <typename Tile>
__device__ __forceinline__ void load_biases(const mv_task &task, TilePlace tile, FewRows<Tile> *fixed) {
    for (int n = threadIdx.x; n < Tile::N && tile.first_output + n < task.linear.outputs; n += kThreads)
        fixed->bias[n] = load_bias<float>(task, find_output(task, tile.first_output + n));
}

/* Starts to copy this warp's k of a step: of the rows from kFirst to kEnd, zeros past hidden. */
template <int kFirst, int kEnd, typename Tile> __device__ __forceinline__ void
copy_few_rows(const FewRows<Tile> *fixed, int64_t hidden, int64_t step, uint32_t stage) {
    const int lane = threadIdx.x % 32, row = lane / kChunks, chunk = lane % kChunks;
    const int64_t k = step * kStep + (threadIdx.x / 32 * kChunks + chunk) * 4;
    const uint32_t to = stage + row * kRowBytes + (chunk ^ row / 2) * 16;
#pragma unroll
    for (int first = kFirst; first < kEnd; first += 8)
        cp_async16_of_128(to + first * kRowBytes, fixed->row[first + row] + (k < hidden ? k : 0), k < hidden);
}

/* Of even k, and of odd ones. */
template <typename Tile> using FewSums = float[2][Tile::own_m][Tile::own_n];

__device__ __forceinline__ void load4(float (&v)[4], const char *from) {
    *reinterpret_cast<float4 *>(v) = *reinterpret_cast<const float4 *>(from);
}

/* sum += x w for this warp's k of a step. Neighbouring products share an operand, which saves reading the register
 * again. */
template <typename Tile> __device__ __forceinline__ void multiply_few(FewSums<Tile> &sum, const char *stage) {
    const int lane = threadIdx.x % 32, m = lane / 8, n = lane % 8;
    const char *const x_rows = stage + (Tile::N + m) * kRowBytes, *const w_rows = stage + n * kRowBytes;
#pragma unroll
    for (int c = 0; c < kChunks; c++) {
        alignas(16) float w[Tile::own_n][4];
#pragma unroll
        for (int j = 0; j < Tile::own_n; j++) load4(w[j], w_rows + j * 8 * kRowBytes + (c ^ n / 2) * 16);
#pragma unroll
        for (int first = 0; first < Tile::own_m; first += Tile::together) {
            alignas(16) float x[Tile::together][4];
#pragma unroll
            for (int i = 0; i < Tile::together; i++)
                load4(x[i], x_rows + (first + i) * 4 * kRowBytes + (c ^ i % 2 * 2 ^ m / 2) * 16);
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
                for (int j = 0; j < Tile::own_n; j++)
#pragma unroll
                    for (int turn = 0; turn < Tile::together; turn++) {
                        const int i = j % 2 ? Tile::together - 1 - turn : turn;
                        float &of = sum[k % 2][first + i][j];
                        of = fmaf(x[i][k], w[j][k], of);
                    }
        }
    }
}

/* The warps' sums meet, and become outputs. `parts`: those of warp 0; the others' are ring_bytes apart. */
template <typename Tile> __device__ __forceinline__ void
store_few_outputs(const mv_task &task, TilePlace tile, const FewRows<Tile> *fixed, const char *parts, int ring_bytes) {
    for (int i = threadIdx.x; i < Tile::M * Tile::N; i += kThreads) {
        const int m = i / Tile::N, n = i % Tile::N;
        if (tile.first_token + m >= task.tokens || tile.first_output + n >= task.linear.outputs) continue;
        float part[kWarps];
#pragma unroll
        for (int warp = 0; warp < kWarps; warp++)
            part[warp] = *reinterpret_cast<const float *>(parts + warp * ring_bytes + (m * Tile::pitch + n) * 4);
        const int64_t token = tile.first_token + m, output = tile.first_output + n;
        row_address<float>(task.out, task.inner, token)[output] =
            finish_output<float>(task, token, output, pairwise_sum<kWarps>(part), fixed->bias[n]);
    }
}

template <typename Tile> __global__ void __launch_bounds__(kThreads, 1)
    few_kernel(const __grid_constant__ mv_task task, int stages) {
    extern __shared__ __align__(128) char smem[];
    const int ring_bytes = stages * Tile::stage_bytes, ahead = stages - 1;
    FewRows<Tile> *const fixed = reinterpret_cast<FewRows<Tile> *>(smem + kWarps * ring_bytes);
    char *const ring = smem + threadIdx.x / 32 * ring_bytes;
    const uint32_t ring_at = shared_address(ring);
    const TilePlace tile = find_tile<Tile::M, Tile::N>(task);
    const int64_t steps = (task.hidden + kStep - 1) / kStep;

    /* Static weights do not depend on the kernel before, x does. */
    find_few_rows(task, tile, fixed, int64_t{ahead} * kStep);
    if (!task.static_weights) griddepcontrol_wait();
    load_biases(task, tile, fixed);
    __syncthreads();
#pragma unroll 1
    for (int step = 0; step < ahead; step++)
        copy_few_rows<0, Tile::N>(fixed, task.hidden, step, ring_at + step * Tile::stage_bytes);
    griddepcontrol_wait();
    griddepcontrol_launch();
#pragma unroll 1
    for (int step = 0; step < ahead; step++) {
        copy_few_rows<Tile::N, Tile::rows>(fixed, task.hidden, step, ring_at + step * Tile::stage_bytes);
        cp_async_commit();
    }

    FewSums<Tile> sum = {};
    int stage = 0, next = ahead * Tile::stage_bytes;
#pragma unroll 1
    for (int64_t step = 0; step < steps; step++) {
        cp_async_wait_all_but(ahead - 1);
        __syncwarp(); /* all lanes' copies are there, and all have left the stage that the next ones go to */
        if (step + ahead < steps) copy_few_rows<0, Tile::rows>(fixed, task.hidden, step + ahead, ring_at + next);
        cp_async_commit();
        multiply_few<Tile>(sum, ring + stage);
        stage = stage + Tile::stage_bytes == ring_bytes ? 0 : stage + Tile::stage_bytes;
        next = next + Tile::stage_bytes == ring_bytes ? 0 : next + Tile::stage_bytes;
    }

    __syncwarp();
    const int m = threadIdx.x % 32 / 8, n = threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < Tile::own_m; i++)
#pragma unroll
        for (int j = 0; j < Tile::own_n; j++)
            *reinterpret_cast<float *>(ring + ((m + 4 * i) * Tile::pitch + n + 8 * j) * 4) =
                sum[0][i][j] + sum[1][i][j];
    __syncthreads();
    store_few_outputs<Tile>(task, tile, fixed, smem, ring_bytes);
}

/* ---- launch ---------------------------------------------------------------------------------------------------- */

template <typename Tile> int stages_of(const mv_task *task) {
    const int64_t room = task->smem_bytes - static_cast<int64_t>(sizeof(FewRows<Tile>));
    const int64_t fit = room / (kWarps * Tile::stage_bytes), steps = ceil_div(task->hidden, kStep) + 1;
    return static_cast<int>(min(fit, min(max(steps, int64_t{kMinStages}), int64_t{kMaxStages})));
}

/* So many tiles one after the other. Infinite where the tile has no room. */
template <typename Tile> double few_tile_cost(const mv_task *task) {
    if (stages_of<Tile>(task) < kMinStages) return 1e30;
    const double rounds = static_cast<double>(ceil_div(tile_count(task, Tile::M, Tile::N), task->sm_count));
    return rounds * prices::few_tile_us(Tile::M, Tile::N, kStep, static_cast<double>(task->hidden) / kStep);
}

template <typename Tile> mv_status launch_few_tile(const mv_task *task, const mv_decision *, mv_error *error) {
    const int stages = stages_of<Tile>(task);
    const Grid grid = {static_cast<unsigned>(tile_count(task, Tile::M, Tile::N)), kThreads,
                       static_cast<size_t>(stages * kWarps * Tile::stage_bytes) + sizeof(FewRows<Tile>)};
    return launch<few_kernel<Tile>>(task, grid, error, *task, stages);
}

struct Choice {
    double cost;
    mv_kernel *launch;
};

template <int kOwnTokens, int... kOwnOutputs> void choose_outputs(const mv_task *task, Choice &best) {
    const auto consider = [&](double cost, mv_kernel *launch) {
        if (cost < best.cost) best = {cost, launch};
    };
    (consider(few_tile_cost<FewTile<kOwnTokens, kOwnOutputs>>(task), launch_few_tile<FewTile<kOwnTokens, kOwnOutputs>>),
     ...);
}

Choice choose_few_tile(const mv_task *task) {
    Choice best = {1e29, nullptr};
    choose_outputs<2, 2, 4, 5, 6, 7, 8, 10>(task, best);
    choose_outputs<4, 2, 4, 5, 6, 7, 8, 10>(task, best);
    choose_outputs<6, 2, 4, 5, 6, 7, 8, 10>(task, best);
    choose_outputs<8, 2, 4, 5, 6, 7, 8, 10>(task, best);
    choose_outputs<12, 2, 4, 5, 6, 7, 8>(task, best);
    choose_outputs<16, 2, 4, 5, 6>(task, best);
    return best;
}

const char *few_why_not(const mv_task *task) {
    if (task->linear.weight_dtype != MV_F32 || task->dtype != MV_F32) return "it takes float32";
    if (task->linear.block[0].col_stride != 1) return "it needs weights that are contiguous along the hidden size";
    if (task->hidden % 4 != 0) return "hidden is no multiple of 4";
    if (tile_count(task, 8, 16) > INT32_MAX) return "there are more tiles than one launch can take";
    for (const mv_block &block : task->linear.block) {
        if (block.outputs && (!is_aligned16(block.weight) || block.row_stride % 4 != 0))
            return "the rows of the weight are not 16-byte aligned";
        if (task->linear.packed) break;
    }
    return nullptr;
}

} // namespace

/* ---- the rows -------------------------------------------------------------------------------------------------- */

extern "C" {
mv_kernel mv_rms_norm_f32_sm80;

const char *mv_norm_few_sm80_decide(const mv_task *task, double below, mv_decision *decision) {
    if (!mv_at_price(decision, prices::norm_few_us(task), below)) return mv_too_dear;
    if (task->linear.gated) return kNotGated;
    if (const char *reason = few_why_not(task)) return reason;
    decision->workspace = plan_workspace(task);
    decision->launch = choose_few_tile(task).launch;
    return decision->launch ? nullptr : "there is too little shared memory";
}

mv_status mv_linear_f32_norm_few_sm80(const mv_task *task, const mv_decision *decision, mv_error *error) {
    return norm_then_product(task, decision, mv_rms_norm_f32_sm80, error);
}
}

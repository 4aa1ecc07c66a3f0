/* ffma_sm80.cu: the projection of many tokens on the CUDA cores, in plain float32. It takes anything:
 * every dtype, float32 weights under 16-bit x, any strides and any alignment of x and of the weights.
 *
 * m: tokens, n: outputs, k: hidden. A CTA owns a tile of m x n and walks over k in steps of 16; a thread keeps 8 x 8 or
 * 8 x 4 sums. While a step is multiplied out of one half of shared memory, the next one is on its way to registers as
 * groups of four values, becomes float32 there (and x becomes y), and goes to the other half.
 *
 * Groups of x lie along k; those of the weight along k or along n, whichever is denser in memory. Where alignment
 * allows a group is one load, otherwise four: the same values in the same places.
 *
 * An output's bits do not depend on the number of tokens: sums take k in order whatever the tile, and r has its own
 * fixed order (token_tile.cuh).
 *
 * Shared memory holds the step as [k][m] and [k][n], with column c of row k at c ^ 8 (k / 4 % 4): so the lanes of a
 * warp that transpose groups of neighbouring rows write to 32 different banks. */
#include "cuda/arch/launch.cuh"
#include "cuda/arch/ptx.cuh"
#include "cuda/arch/vec.cuh"
#include "cuda/cuda.h"
#include "cuda/linear/epilogue.cuh"
#include "cuda/linear/plan.cuh"
#include "cuda/linear/token_tile.cuh"
#include "cuda/norm/rms_norm.cuh"
#include "cuda/prices/linear.cuh"

namespace {

constexpr int kStepK = 16;
constexpr int kGroup = 4; /* values loaded together */
constexpr int kGroupsK = kStepK / kGroup;

/* float32 results keep what they are worth: after so many steps the sums join totals in shared memory, so that a long
 * sum has not its own size times the error of an addition for each of its terms. A sixteenth of hidden, 32 to 128 k. */
__device__ __forceinline__ int steps_together(int64_t hidden) {
    return static_cast<int>(min(max(hidden / 16, int64_t{32}), int64_t{128})) / (2 * kStepK) * 2;
}

/* A thread keeps own_m x own_n sums. The lanes of a warp are 8 x 4, and a lane has rows m + {0-3, 32-35, ...} and
 * columns n + {0-3, 16-19, ...}. */
template <int kTileM, int kTileN, int kOwnM, int kOwnN, int kCtas> struct FfmaTile {
    static constexpr int M = kTileM, N = kTileN, own_m = kOwnM, own_n = kOwnN, ctas_per_sm = kCtas;
    static constexpr int warp_m = 8 * own_m, warp_n = 4 * own_n, warps_n = N / warp_n;
    static constexpr int threads = M * N / (own_m * own_n), own = own_m * own_n;
    static constexpr int x_groups = M * kGroupsK / threads, w_groups = N * kGroupsK / threads; /* of a thread */
    static_assert(M % warp_m == 0 && N % warp_n == 0 && threads % 64 == 0);
    static_assert(M * kGroupsK % threads == 0 && N * kGroupsK % threads == 0);
};

template <typename T> struct alignas(kGroup * sizeof(T)) Group { T v[kGroup]; };

/* What one load instruction brings of a group, by the bytes of a value. */
template <size_t kBytes> struct GroupBits;
template <> struct GroupBits<2> { using type = uint2; };
template <> struct GroupBits<4> { using type = uint4; };

/* How groups are loaded: decided by the launcher. */
struct FfmaAccess {
    bool x_whole, w_whole; /* in one load                       */
    bool w_along_n;        /* the weight's groups, else along k */
};

template <typename Tile, typename T, typename W> struct FfmaShared {
    alignas(16) float x[2][kStepK][Tile::M];
    alignas(16) float w[2][kStepK][Tile::N];
    /* Where rows begin, in bytes from the first row of x, of the residual and of the first block's weight: pointers
     * would lose on their way through shared memory that they point to global memory. */
    int64_t x_row[Tile::M], residual_row[Tile::M], w_row[Tile::N];
    int64_t w_step[Tile::N]; /* in elements, from one k to the next */
    float bias[Tile::N];
    float scale[Tile::M]; /* r */
    /* The threads' sums of earlier steps, where there are any. */
    static constexpr bool has_totals = sizeof(T) == 4;
    alignas(16) float4 total[has_totals ? Tile::own / 4 : 1][has_totals ? Tile::threads : 1];
};

__device__ __forceinline__ int column(int k, int c) { return c ^ (k / kGroup % 4 * 8); }

/* Up to four values at p, the others zero. */
template <Through kThrough = Through::kL1, typename T>
__device__ __forceinline__ Group<T> load_group(const T *p, int64_t count, bool whole) {
    Group<T> group = {};
    if (whole) {
        if (count > 0) {
            using Bits = typename GroupBits<sizeof(T)>::type;
            const Bits bits = load_through<kThrough>(reinterpret_cast<const Bits *>(p));
            group = *reinterpret_cast<const Group<T> *>(&bits);
        }
        return group;
    }
#pragma unroll
    for (int i = 0; i < kGroup; i++)
        if (i < count) group.v[i] = load_through<kThrough>(p + i);
    return group;
}

template <typename T> __device__ __forceinline__ int64_t bytes_between(const void *from, const T *to) {
    return reinterpret_cast<const char *>(to) - static_cast<const char *>(from);
}

template <typename T> __device__ __forceinline__ const T *bytes_after(const void *from, int64_t bytes) {
    return reinterpret_cast<const T *>(static_cast<const char *>(from) + bytes);
}

/* Rows past the end repeat the first one of the tile: what they give is not stored. */
template <typename Tile, typename T, typename W>
__device__ __forceinline__ void find_ffma_rows(const mv_task &task, TilePlace tile, FfmaShared<Tile, T, W> &shared) {
    const int64_t tokens = task.tokens - tile.first_token, outputs = task.linear.outputs - tile.first_output;
    for (int m = threadIdx.x; m < Tile::M; m += Tile::threads) {
        const int64_t token = tile.first_token + (m < tokens ? m : 0);
        shared.x_row[m] = bytes_between(task.x.data, row_address<const T>(task.x, task.inner, token));
        if (task.norm.residual.data)
            shared.residual_row[m] =
                bytes_between(task.norm.residual.data, row_address<const T>(task.norm.residual, task.inner, token));
    }
    for (int n = threadIdx.x; n < Tile::N; n += Tile::threads) {
        const OutputPlace place = find_output(task, tile.first_output + (n < outputs ? n : 0));
        shared.w_row[n] = bytes_between(task.linear.block[0].weight, weight_row<W>(task, place));
        shared.w_step[n] = task.linear.block[place.block].col_stride;
        shared.bias[n] = load_bias<T>(task, place);
    }
}

/* This thread's groups of x of a step; the residual joins on arrival. */
template <typename Tile, typename T> struct TokenGroups {
    Group<T> group[Tile::x_groups];

    template <typename W> __device__ __forceinline__ void
    load(const mv_task &task, const FfmaShared<Tile, T, W> &shared, int64_t k0, bool whole, bool residual) {
        const int64_t k = k0 + threadIdx.x % kGroupsK * kGroup;
#pragma unroll
        for (int i = 0; i < Tile::x_groups; i++) {
            const int m = (threadIdx.x + i * Tile::threads) / kGroupsK;
            const int64_t count = task.hidden - k;
            group[i] = load_group(bytes_after<T>(task.x.data, shared.x_row[m]) + k, count, whole);
            if (residual) {
                const T *row = bytes_after<T>(task.norm.residual.data, shared.residual_row[m]);
                const Group<T> other = load_group(row + k, count, whole);
#pragma unroll
                for (int j = 0; j < kGroup; j++) group[i].v[j] = add_residual(group[i].v[j], other.v[j]);
            }
        }
    }

    template <typename W> __device__ __forceinline__ void store(FfmaShared<Tile, T, W> &shared, int half,
                                                                const float *weights, bool norm, bool twice) const {
        const int k = threadIdx.x % kGroupsK * kGroup;
#pragma unroll
        for (int i = 0; i < Tile::x_groups; i++) {
            const int m = (threadIdx.x + i * Tile::threads) / kGroupsK;
#pragma unroll
            for (int j = 0; j < kGroup; j++) {
                float y = to_float(group[i].v[j]);
                if (norm) y = round_to<T>(apply_norm<T>(y, shared.scale[m], weights[j], twice));
                shared.x[half][k + j][column(k, m)] = y;
            }
        }
    }
};

template <typename Tile, typename W> struct WeightGroups {
    Group<W> group[Tile::w_groups];

    template <Through kThrough = Through::kL1, typename T> __device__ __forceinline__ void
    load(const mv_task &task, const FfmaShared<Tile, T, W> &shared, int64_t k0, FfmaAccess access) {
#pragma unroll
        for (int i = 0; i < Tile::w_groups; i++) {
            const int index = threadIdx.x + i * Tile::threads;
            if (!access.w_along_n) {
                const int n = index / kGroupsK;
                const int64_t k = k0 + index % kGroupsK * kGroup;
                const W *row = bytes_after<W>(task.linear.block[0].weight, shared.w_row[n]);
                const int64_t count = task.hidden - k;
                if (access.w_whole) {
                    group[i] = load_group<kThrough>(row + k, count, true);
                } else {
#pragma unroll
                    for (int j = 0; j < kGroup; j++)
                        group[i].v[j] = j < count ? load_through<kThrough>(row + (k + j) * shared.w_step[n]) : W(0.0f);
                }
            } else {
                const int n = index % (Tile::N / kGroup) * kGroup;
                const int64_t k = k0 + index / (Tile::N / kGroup);
                if (access.w_whole) {
                    const W *row = bytes_after<W>(task.linear.block[0].weight, shared.w_row[n]);
                    group[i] = load_group<kThrough>(row + k * shared.w_step[n], task.hidden - k, true);
                } else {
#pragma unroll
                    for (int j = 0; j < kGroup; j++) {
                        const W *row = bytes_after<W>(task.linear.block[0].weight, shared.w_row[n + j]);
                        group[i].v[j] =
                            k < task.hidden ? load_through<kThrough>(row + k * shared.w_step[n + j]) : W(0.0f);
                    }
                }
            }
        }
    }

    template <typename T>
    __device__ __forceinline__ void store(FfmaShared<Tile, T, W> &shared, int half, bool along_n) const {
#pragma unroll
        for (int i = 0; i < Tile::w_groups; i++) {
            const int index = threadIdx.x + i * Tile::threads;
            if (!along_n) {
                const int n = index / kGroupsK, k = index % kGroupsK * kGroup;
#pragma unroll
                for (int j = 0; j < kGroup; j++) shared.w[half][k + j][column(k, n)] = to_float(group[i].v[j]);
            } else {
                const int n = index % (Tile::N / kGroup) * kGroup, k = index / (Tile::N / kGroup);
                *reinterpret_cast<float4 *>(&shared.w[half][k][column(k, n)]) = make_float4(
                    to_float(group[i].v[0]), to_float(group[i].v[1]), to_float(group[i].v[2]), to_float(group[i].v[3]));
            }
        }
    }
};

/* offset + weight of this thread's four columns of x; zeros past hidden, as in x. */
template <typename T>
__device__ __forceinline__ void load_group_weights(const mv_task &task, int64_t k0, float (&weights)[kGroup]) {
#pragma unroll
    for (int j = 0; j < kGroup; j++) {
        const int64_t k = k0 + threadIdx.x % kGroupsK * kGroup + j;
        weights[j] =
            k < task.hidden ? task.norm.weight_offset + load_as<T>(task.norm.weight, task.norm.weight_dtype, k) : 0.0f;
    }
}

template <typename Tile> using FfmaSums = float[Tile::own_m][Tile::own_n];

/* sum += x w for the 16 k of a step. Neighbouring products share an operand, which saves reading the register again. */
template <typename Tile, typename T, typename W> __device__ __forceinline__ void
multiply_ffma(FfmaSums<Tile> &sum, const FfmaShared<Tile, T, W> &shared, int half, int m, int n) {
#pragma unroll
    for (int k = 0; k < kStepK; k++) {
        float x[Tile::own_m], w[Tile::own_n];
#pragma unroll
        for (int i = 0; i < Tile::own_m; i += 4)
            *reinterpret_cast<float4 *>(x + i) =
                *reinterpret_cast<const float4 *>(&shared.x[half][k][column(k, m + i * 8)]);
#pragma unroll
        for (int j = 0; j < Tile::own_n; j += 4)
            *reinterpret_cast<float4 *>(w + j) =
                *reinterpret_cast<const float4 *>(&shared.w[half][k][column(k, n + j * 4)]);
#pragma unroll
        for (int j = 0; j < Tile::own_n; j++)
#pragma unroll
            for (int turn = 0; turn < Tile::own_m; turn++) {
                const int i = j % 2 ? Tile::own_m - 1 - turn : turn;
                sum[i][j] = fmaf(x[i], w[j], sum[i][j]);
            }
    }
}

/* This thread's totals: joins them to the sums, and keeps these as the totals. */
template <typename Tile, typename T, typename W>
__device__ __forceinline__ void add_totals(FfmaSums<Tile> &sum, const FfmaShared<Tile, T, W> &shared) {
#pragma unroll
    for (int i = 0; i < Tile::own; i += 4) {
        const float4 total = shared.total[i / 4][threadIdx.x];
        float *of = sum[i / Tile::own_n] + i % Tile::own_n;
        of[0] += total.x;
        of[1] += total.y;
        of[2] += total.z;
        of[3] += total.w;
    }
}
template <typename Tile, typename T, typename W>
__device__ __forceinline__ void keep_totals(const FfmaSums<Tile> &sum, FfmaShared<Tile, T, W> &shared) {
#pragma unroll
    for (int i = 0; i < Tile::own; i += 4) {
        const float *of = sum[i / Tile::own_n] + i % Tile::own_n;
        shared.total[i / 4][threadIdx.x] = make_float4(of[0], of[1], of[2], of[3]);
    }
}

/* The thread's rows and columns of the tile, a group at a time. */
template <bool kAdds, typename Tile, typename T, typename W>
__device__ __forceinline__ void store_ffma_outputs(const FfmaSums<Tile> &sum, const FfmaShared<Tile, T, W> &shared,
                                                   int m, int n, TilePlace tile, const mv_task &task) {
#pragma unroll
    for (int i = 0; i < Tile::own_m; i++) {
        const int64_t token = tile.first_token + m + i % 4 + i / 4 * 32;
        if (token >= task.tokens) continue;
        T *row = row_address<T>(task.out, task.inner, token);
        const T *addends = kAdds ? addend_row<T>(task, token) : nullptr;
        const auto whole = [](const T *at, int64_t count) {
            return count >= kGroup && reinterpret_cast<uintptr_t>(at) % sizeof(Group<T>) == 0;
        };
#pragma unroll
        for (int j = 0; j < Tile::own_n; j += kGroup) {
            const int column = n + j * 4;
            const int64_t output = tile.first_output + column, count = task.linear.outputs - output;
            Group<T> group;
            if constexpr (kAdds) {
                const T *from = addends + output;
                const Group<T> addend = load_group<Through::kL2>(from, count, whole(from, count));
#pragma unroll
                for (int v = 0; v < kGroup; v++)
                    group.v[v] = from_float<T>(
                        join_addend<T>(task, sum[i][j + v] + shared.bias[column + v], to_float(addend.v[v])));
            } else {
#pragma unroll
                for (int v = 0; v < kGroup; v++) group.v[v] = finish_output<T>(sum[i][j + v], shared.bias[column + v]);
            }
            if (whole(row + output, count)) {
                *reinterpret_cast<Group<T> *>(row + output) = group;
            } else {
#pragma unroll
                for (int v = 0; v < kGroup; v++)
                    if (v < count) row[output + v] = group.v[v];
            }
        }
    }
}

/* The same of a gated layer: a group has two outputs. A loop that takes the first row of sums and moves the others up
 * needs the code of the activations once, and leaves the sums in registers. */
template <typename Tile, typename T, typename W>
__device__ __forceinline__ void store_ffma_gated(FfmaSums<Tile> &sum, const FfmaShared<Tile, T, W> &shared, int m,
                                                 int n, TilePlace tile, const mv_task &task) {
#pragma unroll 1
    for (int i = 0; i < Tile::own_m; i++) {
        const int64_t token = tile.first_token + m + i % 4 + i / 4 * 32;
        if (token < task.tokens) {
            T *row = row_address<T>(task.out, task.inner, token);
#pragma unroll
            for (int j = 0; j < Tile::own_n; j += 2) {
                const int column = n + j / kGroup * kGroup * 4 + j % kGroup;
                const int64_t output = tile.first_output + column;
                if (output < task.linear.outputs)
                    row[output / 2] =
                        finish_gated<T>(task, sum[0][j] + shared.bias[column], sum[0][j + 1] + shared.bias[column + 1]);
            }
        }
#pragma unroll
        for (int v = 0; v < Tile::own - Tile::own_n; v++) (&sum[0][0])[v] = (&sum[0][0])[v + Tile::own_n];
    }
}

enum class Loads { kAny, kAlongK, kAlongN };

/* kAdds: an addend joins the outputs. kLoads: what is known of access when compiled. */
template <typename T, typename W, typename Tile, bool kNorm, bool kAdds, Loads kLoads>
__global__ void __launch_bounds__(Tile::threads, Tile::ctas_per_sm)
    ffma_kernel(const __grid_constant__ mv_task task, FfmaAccess access) {
    extern __shared__ __align__(16) char smem[];
    FfmaShared<Tile, T, W> &shared = *reinterpret_cast<FfmaShared<Tile, T, W> *>(smem);
    if (kLoads != Loads::kAny) access = {true, true, kLoads == Loads::kAlongN};
    const TilePlace tile = find_tile<Tile::M, Tile::N>(task);
    const int steps = static_cast<int>((task.hidden + kStepK - 1) / kStepK);
    const bool twice = mv_norm_rounds_twice(task.rounding), residual = kNorm && task.norm.residual.data;

    /* Static weights do not depend on the kernel before, x does. */
    if (!task.static_weights) griddepcontrol_wait();
    find_ffma_rows(task, tile, shared);
    __syncthreads();
    WeightGroups<Tile, W> w_next;
    w_next.template load<Through::kL2>(task, shared, 0, access);
    griddepcontrol_wait();
    griddepcontrol_launch();
    TokenGroups<Tile, T> x_next;
    x_next.load(task, shared, 0, access.x_whole, residual);
    float norm_weights[kGroup] = {};
    if (kNorm) {
        load_group_weights<T>(task, 0, norm_weights);
        tile_row_scales<T, Tile::M, Tile::threads>(task, tile.first_token, tile.first_output == 0, shared.scale);
        __syncthreads();
    }
    x_next.store(shared, 0, norm_weights, kNorm, twice);
    w_next.store(shared, 0, access.w_along_n);
    __syncthreads();

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    /* Lanes that read together have few different addresses. */
    const int lane_m = lane / 2 % 8, lane_n = lane % 2 + lane / 16 * 2;
    const int m = warp / Tile::warps_n * Tile::warp_m + lane_m * kGroup;
    const int n = warp % Tile::warps_n * Tile::warp_n + lane_n * kGroup;
    const int together = sizeof(T) == 4 ? steps_together(task.hidden) : steps;
    for (int step = 0; step < steps;) {
        const int first = step, end = min(step + together, steps);
        FfmaSums<Tile> sum = {};
        /* Two steps a turn, so that addresses in shared memory are known when compiled. Behind the last come zeros. */
#pragma unroll 1
        for (; step < end; step += 2)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int64_t next = (step + half + 1) * int64_t{kStepK};
                w_next.load(task, shared, next, access);
                x_next.load(task, shared, next, access.x_whole, residual);
                if (kNorm) load_group_weights<T>(task, next, norm_weights);
                multiply_ffma<Tile>(sum, shared, half, m, n);
                /* to where all warps have left at the last barrier */
                x_next.store(shared, half ^ 1, norm_weights, kNorm, twice);
                w_next.store(shared, half ^ 1, access.w_along_n);
                __syncthreads();
            }
        if (first > 0) add_totals<Tile>(sum, shared);
        if (step < steps)
            keep_totals<Tile>(sum, shared);
        else if (!kNorm && !kAdds && task.linear.gated)
            store_ffma_gated<Tile>(sum, shared, m, n, tile, task);
        else
            store_ffma_outputs<kAdds, Tile>(sum, shared, m, n, tile, task);
    }
}

/* ---- launch ---------------------------------------------------------------------------------------------------- */

template <typename T> bool groups_fit(const void *data, int64_t stride, int64_t row_length) {
    return reinterpret_cast<uintptr_t>(data) % sizeof(Group<T>) == 0 && stride % kGroup == 0 &&
           row_length % kGroup == 0;
}

template <typename T> bool rows_fit(mv_rows rows, int64_t row_length) {
    return !rows.data || (groups_fit<T>(rows.data, rows.inner_stride, row_length) && rows.outer_stride % kGroup == 0);
}

int64_t magnitude(int64_t v) { return v < 0 ? -v : v; }

template <typename T, typename W> FfmaAccess find_access(const mv_task *task) {
    FfmaAccess access = {};
    access.x_whole = rows_fit<T>(task->x, task->hidden) && rows_fit<T>(task->norm.residual, task->hidden);
    access.w_along_n = magnitude(task->linear.block[0].row_stride) < magnitude(task->linear.block[0].col_stride);
    access.w_whole = true;
    for (const mv_block &block : task->linear.block) {
        if (block.outputs == 0) continue;
        const int64_t outputs = task->linear.packed ? task->linear.outputs : block.outputs;
        access.w_whole =
            access.w_whole &&
            (access.w_along_n ? !task->linear.gated && block.row_stride == 1 &&
                                    groups_fit<W>(block.weight, block.col_stride, outputs)
                              : block.col_stride == 1 && groups_fit<W>(block.weight, block.row_stride, task->hidden));
        if (task->linear.packed) break;
    }
    return access;
}

template <typename T, typename W, typename Tile, bool kNorm, bool kAdds, Loads kLoads = Loads::kAny>
mv_status launch_ffma_tile(const mv_task *task, const mv_decision *decision, mv_error *error) {
    const int64_t tiles = tile_count(task, Tile::M, Tile::N);
    if (tiles > INT32_MAX)
        return mv_fail(error, MV_BAD_VALUE, "%s: %lld tokens x %lld outputs are more than one launch can take",
                       task->op, static_cast<long long>(task->tokens), static_cast<long long>(task->linear.outputs));
    const Grid grid = {static_cast<unsigned>(tiles), Tile::threads,
                       spread_blocks(task, tiles, Tile::ctas_per_sm, sizeof(FfmaShared<Tile, T, W>))};
    return launch<ffma_kernel<T, W, Tile, kNorm, kAdds, kLoads>>(task, grid, error, *task,
                                                                 cut_of<FfmaAccess>(decision));
}

using Large = FfmaTile<128, 64, 8, 8, 3>;
template <bool kNorm> using SmallTile = FfmaTile<64, 64, 8, 4, kNorm ? 3 : 4>; /* the norm needs more registers */
using Small = SmallTile<false>;

/* In turns of a tile: an SM computes so many, and one alone on it takes as long as one and a half. */
template <typename Tile> double turns(const mv_task *task) {
    const int64_t share = ceil_div(tile_count(task, Tile::M, Tile::N), task->sm_count);
    return share > 1 ? static_cast<double>(share) : 1.5;
}

/* The large tile needs fewer loads per product: of twice the size, it takes 1.8 times as long. */
template <bool kAdds, Loads kLoads> mv_kernel *choose_float32(const mv_task *task) {
    return 1.8 * turns<Large>(task) < turns<Small>(task) ? launch_ffma_tile<float, float, Large, false, kAdds, kLoads>
                                                         : launch_ffma_tile<float, float, Small, false, kAdds, kLoads>;
}

/* The small tile takes anything. */
template <typename T, typename W, bool kNorm, bool kAdds>
void choose_ffma_tile(const mv_task *task, mv_decision *decision) {
    const FfmaAccess access = find_access<T, W>(task);
    keep_cut(decision, access);
    decision->launch = launch_ffma_tile<T, W, SmallTile<kNorm>, kNorm, kAdds>;
    if constexpr (!kNorm && sizeof(T) == 4)
        if (access.x_whole && access.w_whole)
            decision->launch = access.w_along_n ? choose_float32<kAdds, Loads::kAlongN>(task)
                                                : choose_float32<kAdds, Loads::kAlongK>(task);
}

template <bool kNorm, bool kAdds = false> void choose(const mv_task *task, mv_decision *decision) {
    const bool wide = task->linear.weight_dtype == MV_F32;
    if (task->dtype == MV_F32)
        choose_ffma_tile<float, float, kNorm, kAdds>(task, decision);
    else if (task->dtype == MV_F16)
        wide ? choose_ffma_tile<__half, float, kNorm, kAdds>(task, decision)
             : choose_ffma_tile<__half, __half, kNorm, kAdds>(task, decision);
    else
        wide ? choose_ffma_tile<__nv_bfloat16, float, kNorm, kAdds>(task, decision)
             : choose_ffma_tile<__nv_bfloat16, __nv_bfloat16, kNorm, kAdds>(task, decision);
}

} // namespace

/* ---- the rows -------------------------------------------------------------------------------------------------- */

extern "C" {
mv_kernel mv_rms_norm_f32_sm80, mv_rms_norm_f16_sm80, mv_rms_norm_bf16_sm80;

const char *mv_ffma_sm80_decide(const mv_task *task, double below, mv_decision *decision) {
    if (!mv_at_price(decision, prices::ffma_us(task), below)) return mv_too_dear;
    if (const char *reason = norm_linear_why_not(task)) return reason;
    choose<true>(task, decision);
    return nullptr;
}

const char *mv_norm_ffma_sm80_decide(const mv_task *task, double below, mv_decision *decision) {
    if (!mv_at_price(decision, prices::norm_ffma_us(task), below)) return mv_too_dear;
    PlanTasks tasks = plan_tasks(task);
    if (task->linear.plain_x) {
        tasks.product.x = task->x; /* wherever it lies */
    } else {
        decision->workspace = plan_workspace(task);
        tasks.product.x.data = reinterpret_cast<void *>(16); /* y will be aligned; where it lies is not known yet */
    }
    task->linear.addend.data ? choose<false, true>(&tasks.product, decision) : choose<false>(&tasks.product, decision);
    return nullptr;
}

#define MV_ROWS(dtype)                                                                                                 \
    mv_status mv_linear_##dtype##_ffma_sm80(const mv_task *task, const mv_decision *decision, mv_error *error) {       \
        return decision->launch(task, decision, error);                                                                \
    }                                                                                                                  \
    mv_status mv_linear_##dtype##_norm_ffma_sm80(const mv_task *task, const mv_decision *decision, mv_error *error) {  \
        if (task->linear.plain_x) return decision->launch(task, decision, error);                                      \
        return norm_then_product(task, decision, mv_rms_norm_##dtype##_sm80, error);                                   \
    }
MV_ROWS(f32)
MV_ROWS(f16)
MV_ROWS(bf16)
}

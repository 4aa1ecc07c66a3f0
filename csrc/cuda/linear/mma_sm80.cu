/* mma_sm80.cu: the projection of many tokens on the tensor cores of any GPU from Ampere up, for 16-bit x
 * and weights: the second launch of the plan whose first is the norm kernel.
 *
 * A CTA owns a tile of tokens x outputs (mma_tile.cuh) and walks over hidden in steps of 64, which cp.async brings to a
 * ring of stages in shared memory; a warp multiplies its part of the tile with mma.m16n8k16 while later stages are on
 * their way, and loads the fragments of the next 16 k while the tensor cores work on the current ones. A quarter of a
 * stage is asked for beside each 16 k, so that fragments never queue behind a burst of copies. There is one barrier a
 * step.
 *
 * The largest tile has an SM to itself: its CTAs take one tile after the other, and the ring runs on over them. Of the
 * others two or more share an SM, and one stores its outputs while another multiplies.
 *
 * An output's bits do not depend on the number of tokens: every tile shape adds the same groups of 16 k in the same
 * order into one float32 sum, and k is never split. */
#include "cuda/arch/launch.cuh"
#include "cuda/arch/ptx.cuh"
#include "cuda/arch/vec.cuh"
#include "cuda/cuda.h"
#include "cuda/linear/epilogue.cuh"
#include "cuda/linear/mma_tile.cuh"
#include "cuda/linear/plan.cuh"
#include "cuda/linear/token_tile.cuh"
#include "cuda/norm/rms_norm.cuh"
#include "cuda/prices/linear.cuh"

namespace {

/* A tile: its first token, and its first output in a block of weights whose own first output is `first`. */
struct MmaPlace {
    int64_t token, output, outputs, first;
    int block;
};

template <typename Tile>
__device__ __forceinline__ MmaPlace find_mma_place(const mv_task &task, unsigned tile, unsigned columns) {
    const unsigned rows = static_cast<unsigned>((task.tokens + Tile::M - 1) / Tile::M);
    const TileIndex index = index_tile(tile, rows, columns, 2048 / Tile::M);
    MmaPlace place = {int64_t{index.row} * Tile::M, int64_t{index.column} * Tile::N, task.linear.outputs, 0, 0};
    if (task.linear.packed || task.linear.gated) return place;
    for (; place.block < 3; place.block++) {
        place.outputs = task.linear.block[place.block].outputs;
        if (place.output < place.outputs) break;
        place.output -= (place.outputs + Tile::N - 1) / Tile::N * Tile::N;
        place.first += place.outputs;
    }
    return place;
}

/* The steps of a CTA's tiles, one after the other, on their way to the ring. */
template <typename T, typename Tile, bool kInOut> struct MmaStream {
    const mv_task &task;
    unsigned columns, tiles; /* of tiles; all of them */
    uint32_t ring;

    unsigned tile = blockIdx.x;
    int steps = 0;         /* left of the tile */
    uint32_t stage = ring; /* the next step's */
    Source<Tile::M, kStepK, Tile::threads, false> x = {};
    Source<kInOut ? kStepK : Tile::N, kInOut ? Tile::N : kStepK, Tile::threads, !kInOut> w = {};
    int64_t w_stride = 0;

    /* Behind the last tile come zeros. */
    __device__ __forceinline__ void begin() {
        const bool any = tile < tiles;
        const MmaPlace place = find_mma_place<Tile>(task, any ? tile : 0, columns);
        const mv_block &block = task.linear.block[place.block];
        const T *weight = static_cast<const T *>(block.weight);
        const int64_t outputs = place.outputs - place.output, hidden = any ? task.hidden : 0;
        x.begin(static_cast<const T *>(task.x.data) + place.token * task.hidden, task.hidden, task.tokens - place.token,
                hidden);
        w_stride = kInOut ? block.col_stride : block.row_stride;
        if constexpr (kInOut)
            w.begin(weight + place.output, w_stride, hidden, outputs);
        else if (task.linear.gated)
            w.begin_pairs(task.linear.block, place.output / 2, outputs, hidden);
        else
            w.begin(weight + place.output * w_stride, w_stride, outputs, hidden);
        steps = static_cast<int>((task.hidden + kStepK - 1) / kStepK);
    }

    __device__ __forceinline__ void copy_x(int part) const { x.copy(stage, part); }
    __device__ __forceinline__ void copy_w(int part) const { w.copy(stage + Tile::x_bytes, part); }

    __device__ __forceinline__ void advance_w() {
        if constexpr (kInOut)
            w.advance_rows(w_stride);
        else
            w.advance_columns();
    }

    __device__ __forceinline__ uint32_t after(uint32_t at) const {
        return at + Tile::stage_bytes == ring + Tile::smem_bytes ? ring : at + Tile::stage_bytes;
    }

    __device__ __forceinline__ void advance() {
        stage = after(stage);
        x.advance_columns();
        advance_w();
        if (--steps > 0) return;
        tile += gridDim.x;
        begin();
    }
};

/* The addends of a lane's four outputs in two columns of 8, of a row that has `left` of them. */
template <typename T, bool kInOut>
__device__ __forceinline__ Packet<T> load_addends(const T *from, int64_t left, bool whole) {
    const int first = output_of<kInOut>(0), second = output_of<kInOut>(1);
    Packet<T> packet = {};
    if (whole && !kInOut) {
        const uint2 bits = load_past_l1(reinterpret_cast<const uint2 *>(from + first));
        packet.word[0] = bits.x, packet.word[1] = bits.y;
    } else if (whole) {
        packet.word[0] = load_past_l1(reinterpret_cast<const uint32_t *>(from + first));
        packet.word[1] = load_past_l1(reinterpret_cast<const uint32_t *>(from + second));
    } else {
        const uint16_t *halves = reinterpret_cast<const uint16_t *>(from);
#pragma unroll
        for (int v = 0; v < 4; v++) {
            const int n = (v < 2 ? first : second) + v % 2;
            if (n < left) packet.word[v / 2] |= static_cast<uint32_t>(load_past_l1(halves + n)) << (v % 2 * 16);
        }
    }
    return packet;
}

/* The token that a lane has sums of, in a half of a fragment: row lane / 4 of the fragment, or lane / 4 + 8. */
template <typename Tile> __device__ __forceinline__ int64_t mma_token(const MmaPlace &place, int fragment, int half) {
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 / Tile::warps_n * Tile::warp_m;
    return place.token + first + fragment * 16 + half * 8 + lane / 4;
}

/* The addends join the sums, of outputs from `output` on, of which there are `left`. All are asked for before the first
 * is waited for. */
template <typename T, typename Tile, bool kInOut> __device__ __forceinline__ void
join_mma_addends(MmaSums<Tile> &sum, const mv_task &task, const MmaPlace &place, int64_t output, int64_t left) {
    constexpr int kFragments = Tile::warp_m / 16, kColumns = Tile::warp_n / 8;
    Packet<T> addends[kFragments][2][kColumns / 2]; /* the first four values of each; of tokens that exist */
#pragma unroll
    for (int i = 0; i < kFragments; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int64_t token = mma_token<Tile>(place, i, half);
            if (token >= task.tokens) continue;
            const T *from = addend_row<T>(task, token) + place.first + output;
            const bool whole = left >= Tile::warp_n && reinterpret_cast<uintptr_t>(from) % 8 == 0;
#pragma unroll
            for (int j = 0; j < kColumns; j += 2)
                addends[i][half][j / 2] = load_addends<T, kInOut>(from + j * 8, left - j * 8, whole);
        }
    with_joining(task, [&](auto known) {
#pragma unroll
        for (int i = 0; i < kFragments; i++)
#pragma unroll
            for (int j = 0; j < kColumns; j++)
#pragma unroll
                for (int v = 0; v < 4; v++)
                    sum[i][j][v] = join_addend<T, known.value>(
                        sum[i][j][v], addends[i][v / 2][j / 2].get(j % 2 * 2 + v % 2), task.linear.scale);
    });
}

/* The bias joins the warp's sums, then the addend where there is one, and they become outputs. */
template <typename T, typename Tile, bool kInOut, bool kAdds>
__device__ __forceinline__ void store_mma_outputs(MmaSums<Tile> &sum, const mv_task &task, const MmaPlace &place) {
    const int first_n = threadIdx.x / 32 % Tile::warps_n * Tile::warp_n;
    const mv_block &block = task.linear.block[place.block];
    const int64_t output = place.output + first_n, left = place.outputs - output;
    if (block.bias) {
#pragma unroll
        for (int j = 0; j < Tile::warp_n / 8; j++)
#pragma unroll
            for (int v = 0; v < 2; v++) {
                const int n = j / 2 * 16 + output_of<kInOut>(j % 2) + v;
                const float bias = load_as_past_l1<T>(block.bias, block.bias_dtype, n < left ? output + n : 0);
#pragma unroll
                for (int i = 0; i < Tile::warp_m / 16; i++) {
                    sum[i][j][v] += bias;
                    sum[i][j][2 + v] += bias;
                }
            }
    }
    if constexpr (kAdds) join_mma_addends<T, Tile, kInOut>(sum, task, place, output, left);
#pragma unroll
    for (int i = 0; i < Tile::warp_m / 16; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int64_t token = mma_token<Tile>(place, i, half);
            if (token >= task.tokens) continue;
            T *row = row_address<T>(task.out, task.inner, token) + place.first + output;
            const bool whole = left >= Tile::warp_n && reinterpret_cast<uintptr_t>(row) % 8 == 0;
#pragma unroll
            for (int j = 0; j < Tile::warp_n / 8; j += 2) {
                const uint32_t pair[2] = {pack_word<T>(sum[i][j] + 2 * half), pack_word<T>(sum[i][j + 1] + 2 * half)};
                T *to = row + j * 8;
                if (whole && !kInOut) {
                    *reinterpret_cast<uint2 *>(to + output_of<kInOut>(0)) = make_uint2(pair[0], pair[1]);
                } else if (whole) {
                    *reinterpret_cast<uint32_t *>(to + output_of<kInOut>(0)) = pair[0];
                    *reinterpret_cast<uint32_t *>(to + output_of<kInOut>(1)) = pair[1];
                } else {
#pragma unroll
                    for (int v = 0; v < 4; v++) {
                        const int n = output_of<kInOut>(v / 2) + v % 2;
                        if (j * 8 + n < left) to[n] = reinterpret_cast<const T *>(pair)[v];
                    }
                }
            }
        }
}

/* The same of a gated layer: of this thread's four sums in 16 columns two are the gate's and two are up's, in turns, so
 * that they make two neighbours. A loop that takes the first sums and moves the others up needs the code of the
 * activations once, and leaves the sums in registers. */
template <typename T, typename Tile>
__device__ __forceinline__ void store_mma_gated(MmaSums<Tile> &sum, const mv_task &task, const MmaPlace &place) {
    constexpr int kColumns = Tile::warp_n / 8;
    const int first_n = threadIdx.x / 32 % Tile::warps_n * Tile::warp_n;
    const int64_t outputs = place.outputs / 2;
    int64_t output = (place.output + first_n + output_of<false>(0)) / 2;
#pragma unroll 1
    for (int j = 0; j < kColumns; j += 2, output += 8) {
        if (output >= outputs) return;
        const bool both = output + 1 < outputs;
        const float gate_bias[2] = {load_bias<T>(task, {0, output}), both ? load_bias<T>(task, {0, output + 1}) : 0};
        const float up_bias[2] = {load_bias<T>(task, {1, output}), both ? load_bias<T>(task, {1, output + 1}) : 0};
#pragma unroll
        for (int i = 0; i < Tile::warp_m / 16; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int64_t token = mma_token<Tile>(place, i, half);
                if (token >= task.tokens) continue;
                alignas(4) T pair[2];
#pragma unroll
                for (int v = 0; v < 2; v++) {
                    const float *of = sum[i][v] + 2 * half;
                    pair[v] = finish_gated<T>(task, of[0] + gate_bias[v], of[1] + up_bias[v]);
                }
                T *to = row_address<T>(task.out, task.inner, token) + output;
                if (both && reinterpret_cast<uintptr_t>(to) % 4 == 0) {
                    *reinterpret_cast<uint32_t *>(to) = *reinterpret_cast<const uint32_t *>(pair);
                } else {
                    to[0] = pair[0];
                    if (both) to[1] = pair[1];
                }
            }
#pragma unroll
        for (int i = 0; i < Tile::warp_m / 16; i++)
#pragma unroll
            for (int v = 0; v < 4 * (kColumns - 2); v++) (&sum[i][0][0])[v] = (&sum[i][0][0])[v + 8];
    }
}

template <typename T, typename Tile, bool kInOut, bool kAdds>
__global__ void __launch_bounds__(Tile::threads, Tile::ctas_per_sm)
    mma_kernel(const __grid_constant__ mv_task task, unsigned columns, unsigned tiles) {
    extern __shared__ __align__(1024) char smem[];
    constexpr int kAhead = Tile::stages - 1, kLast = kParts - 1;
    MmaStream<T, Tile, kInOut> stream = {task, columns, tiles, shared_address(smem)};

    /* Static weights do not depend on the kernel before, x does. Half of the ring's weights go ahead, no more: copies
     * arrive in order, and the first product should not wait for the last stage. The loops stay loops: code is loaded,
     * too. */
    stream.begin();
    const int steps = stream.steps, early = min(kAhead / 2, steps);
    if (!task.static_weights) {
        MmaStream<T, Tile, kInOut> ahead = stream;
#pragma unroll 1
        for (int step = 0; step < early; step++) {
            ahead.w.prefetch();
            ahead.advance_w();
        }
        griddepcontrol_wait();
    }
    MmaStream<T, Tile, kInOut> weights = stream;
#pragma unroll 1
    for (int step = 0; step < early; step++) {
#pragma unroll
        for (int part = 0; part < kParts; part++) weights.copy_w(part);
        weights.stage += Tile::stage_bytes;
        weights.advance_w();
    }
    griddepcontrol_wait();
    griddepcontrol_launch();
#pragma unroll 1
    for (int step = 0; step < kAhead; step++) {
#pragma unroll
        for (int part = 0; part < kParts; part++) {
            stream.copy_x(part);
            if (step >= early) stream.copy_w(part);
        }
        cp_async_commit();
        stream.advance();
    }
    stream.copy_x(0);
    stream.copy_w(0);
    cp_async_wait<kAhead - 1>();
    __syncthreads();

    uint32_t stage = stream.ring;
    MmaSums<Tile> sum;
    Fragments<Tile, kInOut> fragments[2];
    fragments[0].load(stage, 0);
#pragma unroll 1
    for (unsigned tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
#pragma unroll
        for (int i = 0; i < Tile::warp_m * Tile::warp_n / 32; i++) (&sum[0][0][0])[i] = 0;
#pragma unroll 1
        for (int step = 0; step < steps; step++) {
#pragma unroll
            for (int part = 0; part < kParts; part++) {
                if (part == kLast) {
                    cp_async_commit();
                    stream.advance();
                    /* All threads' copies of the next step are in, and all warps hold their last fragments of this one:
                     * the next copies go where it was. */
                    cp_async_wait<kAhead - 1>();
                    __syncthreads();
                    stage = stream.after(stage);
                }
                const int next = (part + 1) % kParts;
                fragments[next % 2].load(stage, next);
                stream.copy_x(next);
                stream.copy_w(next);
                multiply_mma<T, Tile, kInOut>(sum, fragments[part % 2]);
            }
        }
        const MmaPlace place = find_mma_place<Tile>(task, tile, columns);
        if (!kInOut && !kAdds && task.linear.gated)
            store_mma_gated<T, Tile>(sum, task, place);
        else
            store_mma_outputs<T, Tile, kInOut, kAdds>(sum, task, place);
    }
}

/* ---- launch ---------------------------------------------------------------------------------------------------- */

/* The large tiles read each operand fewer times, the small ones fill the GPU with few tokens. */
using Tile128x256 = MmaTile<128, 256, 2, 4, 4, 1>;
using Tile128x128 = MmaTile<128, 128, 2, 2, 3, 2>;
using Tile128x96 = MmaTile<128, 96, 2, 2, 4, 2>;
using Tile64x128 = MmaTile<64, 128, 2, 2, 4, 2>;
using Tile64x96 = MmaTile<64, 96, 2, 2, 3, 3>;
using Tile64x64 = MmaTile<64, 64, 2, 2, 3, 4>;
using Tile32x64 = MmaTile<32, 64, 2, 2, 8, 2>;

template <typename Tile> int64_t count_tiles(const mv_task *task) {
    return ceil_div(task->tokens, Tile::M) * block_columns(task, Tile::N);
}

/* An instance, what its tiles take, the outputs of one, in thousands, and how many an SM has. */
struct MmaChoice {
    mv_kernel *launch;
    double us, stored;
    int64_t share;
};

template <typename Tile> MmaChoice choice_of(const mv_task *task, mv_kernel *launch) {
    if (Tile::smem_bytes > task->smem_bytes) return {launch, 1e30, 0, 0};
    const int64_t share = ceil_div(count_tiles<Tile>(task), task->sm_count);
    const double steps = static_cast<double>(ceil_div(task->hidden, kStepK));
    return {launch, prices::mma_tiles_us(Tile::M, Tile::N, Tile::ctas_per_sm, steps, share), Tile::M * Tile::N / 1e3,
            share};
}

template <typename T, typename Tile, bool kInOut, bool kAdds>
mv_status launch_mma_tile(const mv_task *task, const mv_decision *, mv_error *error) {
    const int64_t tiles = count_tiles<Tile>(task);
    if (tiles > INT32_MAX)
        return mv_fail(error, MV_BAD_VALUE, "%s: %lld tokens x %lld outputs are more than one launch can take",
                       task->op, static_cast<long long>(task->tokens), static_cast<long long>(task->linear.outputs));
    const int64_t ctas = Tile::ctas_per_sm == 1 && tiles > task->sm_count ? task->sm_count : tiles;
    const Grid grid = {static_cast<unsigned>(ctas), Tile::threads,
                       spread_blocks(task, ctas, Tile::ctas_per_sm, Tile::smem_bytes)};
    return launch<mma_kernel<T, Tile, kInOut, kAdds>>(
        task, grid, error, *task, static_cast<unsigned>(block_columns(task, Tile::N)), static_cast<unsigned>(tiles));
}

template <typename T, bool kAdds, bool kInOut, typename... Tiles> MmaChoice cheapest(const mv_task *task) {
    const MmaChoice choices[] = {choice_of<Tiles>(task, launch_mma_tile<T, Tiles, kInOut, kAdds>)...};
    size_t best = 0;
    for (size_t i = 1; i < sizeof...(Tiles); i++)
        if (choices[i].us < choices[best].us) best = i;
    return choices[best];
}

/* The last of each list fits every GPU. Fewer tiles for the rarer layout: each is code to compile, ship and load. */
template <typename T, bool kAdds> MmaChoice choose_mma_tile(const mv_task *task) {
    if (task->linear.block[0].col_stride != 1)
        return cheapest<T, kAdds, true, Tile128x256, Tile128x128, Tile64x128, Tile64x64>(task);
    return cheapest<T, kAdds, false, Tile128x256, Tile128x128, Tile128x96, Tile64x128, Tile64x96, Tile64x64, Tile32x64>(
        task);
}

template <typename T> MmaChoice choose_end(const mv_task *task) {
    return task->linear.addend.data ? choose_mma_tile<T, true>(task) : choose_mma_tile<T, false>(task);
}

/* ---- what these kernels can take ------------------------------------------------------------------------------- */

bool pieces_fit(const void *data, int64_t stride) { return is_aligned16(data) && stride % kPiece == 0; }

} // namespace

extern "C" const char *mv_tensor_cores_why_not(const mv_task *task) {
    if (task->dtype == MV_F32 || task->linear.weight_dtype != task->dtype)
        return "the tensor cores take 16-bit x with weights of its dtype";
    if (task->hidden % kPiece != 0) return "hidden is no multiple of 8";
    if (task->linear.packed && task->linear.block[0].row_stride == 1 && task->linear.outputs % kPiece != 0)
        return "the outputs of the in_out weight are no multiple of 8";
    for (const mv_block &block : task->linear.block) {
        if (block.outputs == 0) continue;
        const bool out_in = block.col_stride == 1;
        if (out_in != (task->linear.block[0].col_stride == 1) || (!out_in && block.row_stride != 1))
            return "the weight is contiguous along neither outputs nor hidden";
        if (!pieces_fit(block.weight, out_in ? block.row_stride : block.col_stride))
            return "the rows of the weight are not 16-byte aligned";
        if (!out_in && !task->linear.packed && block.outputs % kPiece != 0)
            return "the outputs of an in_out weight are no multiple of 8";
        if (task->linear.packed) break;
    }
    return nullptr;
}

extern "C" const char *mv_norm_mma_sm80_decide(const mv_task *task, double below, mv_decision *decision) {
    if (!mv_at_price(decision, prices::norm_mma_us(task, 0, 0, 0), below)) return mv_too_dear; /* at least */
    if (const char *reason = mv_tensor_cores_why_not(task)) return reason;
    if (task->linear.gated && task->linear.block[0].col_stride != 1)
        return "it takes a gated layer's weights as nn.Linear keeps them, not a transposed copy";
    const MmaChoice choice = task->dtype == MV_F16 ? choose_end<__half>(task) : choose_end<__nv_bfloat16>(task);
    const double us = prices::norm_mma_us(task, choice.us, choice.stored, choice.share);
    if (!mv_at_price(decision, us, below)) return mv_too_dear;
    decision->workspace = plan_workspace(task);
    decision->launch = choice.launch;
    return nullptr;
}

/* ---- the rows -------------------------------------------------------------------------------------------------- */

extern "C" {
mv_kernel mv_rms_norm_f16_sm80, mv_rms_norm_bf16_sm80;

mv_status mv_linear_f16_norm_mma_sm80(const mv_task *task, const mv_decision *decision, mv_error *error) {
    return norm_then_product(task, decision, mv_rms_norm_f16_sm80, error);
}

mv_status mv_linear_bf16_norm_mma_sm80(const mv_task *task, const mv_decision *decision, mv_error *error) {
    return norm_then_product(task, decision, mv_rms_norm_bf16_sm80, error);
}
}

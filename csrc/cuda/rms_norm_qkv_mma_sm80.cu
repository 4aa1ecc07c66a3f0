/* rms_norm_qkv_mma_sm80.cu: the projection of many tokens on the tensor cores, for 16-bit x and weights.
 *
 * A CTA owns a tile of tokens x outputs (mma_tile.cuh) and walks over hidden in steps of 64, which cp.async brings to a
 * ring of stages in shared memory; a warp multiplies its part of the tile with mma.m16n8k16 while later stages are on
 * their way, and loads the fragments of the next 16 k while the tensor cores work on the current ones. A quarter of a
 * stage is asked for beside each 16 k, so that fragments never queue behind a burst of copies.
 *
 * The norm is a template flag. With it the CTA first computes r of its tokens (once per tile, never per output), and
 * each thread turns the pieces of x it has copied itself into y, in place, before the barrier that shows the stage to
 * the others: the product sees exactly the rounded y. Without it x is multiplied as it is: the second launch of the plan
 * whose first is the norm kernel.
 *
 * An output's bits do not depend on the number of tokens: every tile shape adds the same groups of 16 k in the same
 * order into one float32 sum, k is never split, and r has its own fixed order (token_tile.cuh). */
#include "cuda.h"
#include "launch.cuh"
#include "mma_tile.cuh"
#include "norm_plan.cuh"
#include "ptx.cuh"
#include "qkv_epilogue.cuh"
#include "rms_norm.cuh"
#include "token_tile.cuh"
#include "vec.cuh"

namespace {

/* Where the rows of the tile are, looked up once. Weights: the address at k = 0 of output n, or in the in_out layout of
 * the 8 outputs from 8 n on, and the bytes from there to the next k. */
template <typename Tile> struct Places {
    const char *x[Tile::M], *residual[Tile::M];
    char *out[Tile::M];
    const char *weight[Tile::N];
    int64_t weight_step[Tile::N / kPiece];
    alignas(8) float bias[Tile::N];
    float scale[Tile::M]; /* r */
};

template <typename Tile> constexpr size_t smem_bytes(bool residual) {
    return Tile::stages * (Tile::x_bytes + Tile::w_bytes + (residual ? Tile::x_bytes : 0)) + sizeof(Places<Tile>);
}

__device__ __forceinline__ int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Rows past the end repeat the last one: what they give is not stored. */
template <typename T, typename Tile, bool kInOut>
__device__ __forceinline__ void find_weights(const mv_task &task, int64_t first, Places<Tile> &places) {
    if constexpr (!kInOut) {
        for (int n = threadIdx.x; n < Tile::N; n += Tile::threads) {
            const OutputPlace place = find_output(task, least(first + n, task.outputs - 1));
            places.weight[n] = reinterpret_cast<const char *>(weight_row<T>(task, place));
        }
    } else {
        for (int c = threadIdx.x; c < Tile::N / kPiece; c += Tile::threads) {
            const OutputPlace place = find_output(task, least(first + c * kPiece, task.outputs - kPiece));
            places.weight[c] = reinterpret_cast<const char *>(weight_row<T>(task, place));
            places.weight_step[c] = task.block[place.block].col_stride * static_cast<int64_t>(sizeof(T));
        }
    }
}

template <typename T, typename Tile>
__device__ __forceinline__ void load_biases(const mv_task &task, int64_t first, Places<Tile> &places) {
    for (int n = threadIdx.x; n < Tile::N; n += Tile::threads)
        places.bias[n] = load_bias<T>(task, find_output(task, least(first + n, task.outputs - 1)));
}

template <typename T, typename Tile>
__device__ __forceinline__ void find_tokens(const mv_task &task, int64_t first, Places<Tile> &places) {
    for (int m = threadIdx.x; m < Tile::M; m += Tile::threads) {
        const int64_t token = least(first + m, task.tokens - 1);
        places.x[m] = reinterpret_cast<const char *>(row_address<const T>(task.x, task.inner, token));
        places.out[m] = reinterpret_cast<char *>(row_address<T>(task.out, task.inner, token));
        if (task.residual.data)
            places.residual[m] = reinterpret_cast<const char *>(row_address<const T>(task.residual, task.inner, token));
    }
}

/* x -> y in place, on the pieces that this thread has copied and therefore already sees. */
template <typename T, typename Tile> __device__ __forceinline__ void
normalise_pieces(char *x, const char *residual, const float *scale, const NormWeights<T> &weights, bool hf) {
    using Own = OwnPieces<Tile::M, Tile::threads>;
#pragma unroll
    for (int i = 0; i < Own::count; i++) {
        const int offset = Own::offset_bytes(i);
        Packet<T> *packet = reinterpret_cast<Packet<T> *>(x + offset);
        Packet<T> s = *packet;
        if (residual) s = add_residual(s, *reinterpret_cast<const Packet<T> *>(residual + offset));
        *packet = apply_norm(s, scale[Own::row(i)], weights, hf);
    }
}

/* The warp's sums become outputs: through its own corner of shared memory, so that they leave 16 bytes at a time. */
template <typename T, typename Tile>
__device__ __forceinline__ void store_outputs(const float (&sum)[Tile::warp_m / 16][Tile::warp_n / 8][4],
                                              const Places<Tile> &places, char *smem, int64_t first_token,
                                              int64_t first_output, const mv_task &task) {
    constexpr int kPitch = Tile::warp_n + kPiece; /* the extra piece spreads the rows over the banks */
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_m = warp / Tile::warps_n * Tile::warp_m, first_n = warp % Tile::warps_n * Tile::warp_n;
    T *corner = reinterpret_cast<T *>(smem) + warp * Tile::warp_m * kPitch;
#pragma unroll
    for (int i = 0; i < Tile::warp_m / 16; i++)
#pragma unroll
        for (int j = 0; j < Tile::warp_n / 8; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) { /* rows lane / 4 and lane / 4 + 8 of the fragment */
                const int m = i * 16 + lane / 4 + half * 8, n = j * 8 + lane % 4 * 2;
                const float2 bias = *reinterpret_cast<const float2 *>(places.bias + first_n + n);
                *reinterpret_cast<uint32_t *>(corner + m * kPitch + n) =
                    finish_pair<T>(sum[i][j][2 * half], sum[i][j][2 * half + 1], bias);
            }
    __syncwarp();
    constexpr int kPieces = Tile::warp_n / kPiece;
#pragma unroll 4
    for (int i = lane; i < Tile::warp_m * kPieces; i += 32) {
        const int m = i / kPieces, n = i % kPieces * kPiece;
        const int64_t output = first_output + first_n + n;
        if (first_token + first_m + m >= task.tokens || output >= task.outputs) continue;
        T *to = reinterpret_cast<T *>(places.out[first_m + m]) + output;
        store_packet(to, *reinterpret_cast<const Packet<T> *>(corner + m * kPitch + n), task.outputs - output,
                     reinterpret_cast<uintptr_t>(to) % 16 == 0);
    }
}

template <typename T, typename Tile, bool kInOut, bool kNorm>
__global__ void __launch_bounds__(Tile::threads, Tile::ctas_per_sm)
    rms_norm_qkv_mma_kernel(const __grid_constant__ mv_task task) {
    extern __shared__ __align__(1024) char smem[];
    constexpr int kRing = Tile::stages;
    char *const x_stages = smem, *const w_stages = x_stages + kRing * Tile::x_bytes;
    Places<Tile> &places = *reinterpret_cast<Places<Tile> *>(w_stages + kRing * Tile::w_bytes);
    char *const residual_stages = reinterpret_cast<char *>(&places + 1);
    const uint32_t x_address = shared_address(x_stages), w_address = shared_address(w_stages);
    const uint32_t residual_address = shared_address(residual_stages);
    const bool has_residual = kNorm && task.residual.data, hf = task.rounding == MV_ROUNDING_HF;
    const TilePlace tile = find_tile<Tile::M, Tile::N>(task);
    const int steps = static_cast<int>((task.hidden + kStepK - 1) / kStepK);

    const auto copy_x = [&](int step, int part) {
        const int slot = step % kRing;
        const int64_t k0 = step * int64_t{kStepK};
        copy_rows<Tile::M, Tile::threads>(places.x, x_address + slot * Tile::x_bytes, k0, task.hidden, part);
        if (has_residual)
            copy_rows<Tile::M, Tile::threads>(places.residual, residual_address + slot * Tile::x_bytes, k0, task.hidden,
                                              part);
    };
    const auto copy_w = [&](int step, int part) {
        const uint32_t to = w_address + step % kRing * Tile::w_bytes;
        const int64_t k0 = step * int64_t{kStepK};
        if constexpr (kInOut)
            copy_columns<Tile::N, Tile::threads>(places.weight, places.weight_step, to, k0, task.hidden, part);
        else
            copy_rows<Tile::N, Tile::threads>(places.weight, to, k0, task.hidden, part);
    };

    /* Weights do not depend on the kernel before, x does. Half of the ring's weights go ahead, no more: copies arrive in
     * order, and the first product should not wait for the last stage. The loops stay loops: code is loaded, too. */
    constexpr int kEarly = kRing / 2;
    if (task.dynamic_weights) griddepcontrol_wait();
    find_weights<T, Tile, kInOut>(task, tile.first_output, places);
    __syncthreads();
#pragma unroll 1
    for (int step = 0; step < kEarly && step < steps; step++)
#pragma unroll
        for (int part = 0; part < kParts; part++) copy_w(step, part);
    find_tokens<T, Tile>(task, tile.first_token, places);
    const bool norm_weight_aligned = reinterpret_cast<uintptr_t>(task.norm_weight) % 16 == 0;
    const int own_column = OwnPieces<Tile::M, Tile::threads>::column();
    NormWeights<T> norm_weights = {};
    if (kNorm) norm_weights = load_norm_weights<T>(task, own_column, norm_weight_aligned);
    __syncthreads();
    griddepcontrol_wait();
    griddepcontrol_launch();
#pragma unroll 1
    for (int step = 0; step < kRing - 1; step++) {
#pragma unroll
        for (int part = 0; part < kParts; part++) {
            if (step < steps) copy_x(step, part);
            if (step < steps && step >= kEarly) copy_w(step, part);
        }
        cp_async_commit();
    }
    load_biases<T, Tile>(task, tile.first_output, places);
    if (kNorm) {
        tile_row_scales<T, Tile::M, Tile::threads>(task, tile.first_token, tile.first_output == 0, places.scale);
        __syncthreads();
    }

    /* Step `step` has arrived: this thread's copies of it are visible to this thread; now y takes x's place. */
    const auto normalise = [&](int step) {
        if (kNorm && step < steps) {
            const int offset = step % kRing * Tile::x_bytes;
            normalise_pieces<T, Tile>(x_stages + offset, has_residual ? residual_stages + offset : nullptr,
                                      places.scale, norm_weights, hf);
            norm_weights = load_norm_weights<T>(task, (step + 1) * int64_t{kStepK} + own_column, norm_weight_aligned);
        }
    };
    cp_async_wait<kRing - 2>();
    normalise(0);
    __syncthreads();

    float sum[Tile::warp_m / 16][Tile::warp_n / 8][4] = {};
    Fragments<Tile, kInOut> fragments[2];
    fragments[0].load(x_address, w_address, 0);
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
#pragma unroll
        for (int part = 0; part < kParts; part++) {
            constexpr int kLast = kParts - 1;
            if (part == kLast - 1) {
                cp_async_wait<kRing - 3>();
                normalise(step + 1);
            }
            /* All threads' copies of the next step are in, and all warps hold their last fragments of this one. */
            if (part == kLast) __syncthreads();
            const int slot = (part == kLast ? step + 1 : step) % kRing;
            if (part < kLast || step + 1 < steps)
                fragments[(part + 1) % 2].load(x_address + slot * Tile::x_bytes, w_address + slot * Tile::w_bytes,
                                               (part + 1) % kParts);
            if (step + kRing - 1 < steps) { /* into the slot of the step before, which all warps have left */
                copy_w(step + kRing - 1, part);
                copy_x(step + kRing - 1, part);
            }
            if (part == kLast) cp_async_commit();
            multiply<T, Tile, kInOut>(sum, fragments[part % 2]);
        }
    }
    __syncthreads(); /* the stages become the epilogue's */
    store_outputs<T, Tile>(sum, places, smem, tile.first_token, tile.first_output, task);
}

/* ---- launch ---------------------------------------------------------------------------------------------------- */

/* The large tiles read each operand fewer times, the small ones fill the GPU with few tokens. step_us: measured on an
 * H100, for 64 k of all the tiles that share an SM. */
struct Tile128x256 : Tile<128, 256, 2, 4, 4, 1> {
    static constexpr double step_us = 1.23;
};
struct Tile128x192 : Tile<128, 192, 2, 4, 5, 1> {
    static constexpr double step_us = 1.00;
};
struct Tile128x128 : Tile<128, 128, 2, 4, 6, 1> {
    static constexpr double step_us = 0.83;
};
struct Tile128x96 : Tile<128, 96, 4, 2, 6, 1> {
    static constexpr double step_us = 0.72;
};
struct Tile64x128 : Tile<64, 128, 2, 4, 8, 1> {
    static constexpr double step_us = 0.54;
};
struct Tile64x64 : Tile<64, 64, 2, 2, 6, 2> {
    static constexpr double step_us = 0.58;
};
struct Tile32x64 : Tile<32, 64, 2, 2, 8, 2> {
    static constexpr double step_us = 0.48;
};
/* With the norm, shared memory also holds the residual. These two step_us are estimates. */
struct NormTile128x128 : Tile<128, 128, 2, 4, 4, 1> {
    static constexpr double step_us = 2.0;
};
struct NormTile32x64 : Tile<32, 64, 2, 2, 6, 2> {
    static constexpr double step_us = 0.9;
};

/* Microseconds of an H100: the tiles run in waves, and a tile takes its steps and about two more to begin and to end
 * (SPEED.md). */
template <typename Tile> double tile_cost(const mv_task *task) {
    if (smem_bytes<Tile>(task->residual.data) > static_cast<size_t>(task->smem_bytes)) return 1e30;
    const int64_t at_once = Tile::ctas_per_sm * static_cast<int64_t>(task->sm_count);
    const int64_t waves = (tile_count(task, Tile::M, Tile::N) + at_once - 1) / at_once;
    const int64_t steps = (task->hidden + kStepK - 1) / kStepK;
    return static_cast<double>(waves * (steps + 2)) * Tile::step_us;
}

template <typename T, typename Tile, bool kInOut, bool kNorm>
mv_status launch_tile(const mv_task *task, mv_error *error) {
    const int64_t tiles = tile_count(task, Tile::M, Tile::N);
    if (tiles > INT32_MAX)
        return mv_fail(error, MV_BAD_VALUE,
                       "rms_norm_qkv: %lld tokens x %lld outputs are more than one launch can take",
                       static_cast<long long>(task->tokens), static_cast<long long>(task->outputs));
    const Grid grid = {dim3(static_cast<unsigned>(tiles)), Tile::threads, smem_bytes<Tile>(task->residual.data)};
    return launch<rms_norm_qkv_mma_kernel<T, Tile, kInOut, kNorm>>(task, grid, error, *task);
}

template <typename T, bool kInOut, bool kNorm, typename... Tiles>
mv_status launch_cheapest(const mv_task *task, mv_error *error) {
    mv_kernel *const launches[] = {launch_tile<T, Tiles, kInOut, kNorm>...};
    const double costs[] = {tile_cost<Tiles>(task)...};
    size_t best = 0;
    for (size_t i = 1; i < sizeof...(Tiles); i++)
        if (costs[i] < costs[best]) best = i;
    return launches[best](task, error);
}

/* The last of each list fits every GPU. Fewer tiles for the rarer cases: each is code to compile, ship and load. */
template <typename T> mv_status norm_and_product(const mv_task *task, mv_error *error) {
    return task->block[0].col_stride == 1 ? launch_cheapest<T, false, true, NormTile128x128, NormTile32x64>(task, error)
                                          : launch_cheapest<T, true, true, NormTile128x128, NormTile32x64>(task, error);
}

template <typename T> mv_status product(const mv_task *task, mv_error *error) {
    return task->block[0].col_stride == 1 ? launch_cheapest<T, false, false, Tile128x256, Tile128x192, Tile128x128,
                                                            Tile128x96, Tile64x128, Tile32x64>(task, error)
                                          : launch_cheapest<T, true, false, Tile128x128, Tile64x64>(task, error);
}

/* ---- what these kernels can take ------------------------------------------------------------------------------- */

bool pieces_fit(const void *data, int64_t stride) { return is_aligned16(data) && stride % kPiece == 0; }

} // namespace

extern "C" const char *mv_norm_mma_fits(const mv_task *task) {
    if (task->dtype == MV_F32 || task->weight_dtype != task->dtype)
        return "the tensor cores take 16-bit x with weights of its dtype";
    if (task->hidden % kPiece != 0) return "hidden is no multiple of 8";
    if (task->packed && task->block[0].row_stride == 1 && task->outputs % kPiece != 0)
        return "the outputs of the in_out weight are no multiple of 8";
    for (const mv_block &block : task->block) {
        if (block.outputs == 0) continue;
        const bool out_in = block.col_stride == 1;
        if (out_in != (task->block[0].col_stride == 1) || (!out_in && block.row_stride != 1))
            return "the weight is contiguous along neither outputs nor hidden";
        if (!pieces_fit(block.weight, out_in ? block.row_stride : block.col_stride))
            return "the rows of the weight are not 16-byte aligned";
        if (!out_in && !task->packed && block.outputs % kPiece != 0)
            return "the outputs of an in_out weight are no multiple of 8";
        if (task->packed) break;
    }
    return nullptr;
}

extern "C" const char *mv_mma_fits(const mv_task *task) {
    const char *why_not = mv_norm_mma_fits(task);
    if (why_not) return why_not;
    if (!rows_aligned16(task->x, 2)) return "the rows of x are not 16-byte aligned";
    if (task->residual.data && !rows_aligned16(task->residual, 2))
        return "the rows of the residual are not 16-byte aligned";
    return nullptr;
}

extern "C" size_t mv_norm_plan_workspace(const mv_task *task) {
    return static_cast<size_t>(task->tokens) * static_cast<size_t>(task->hidden) * mv_dtype_bytes(task->dtype);
}

/* ---- the rows -------------------------------------------------------------------------------------------------- */

extern "C" {
mv_kernel mv_rms_norm_f16_sm80, mv_rms_norm_bf16_sm80;

mv_status mv_rms_norm_qkv_f16_mma_sm80(const mv_task *task, mv_error *error) {
    return norm_and_product<__half>(task, error);
}

mv_status mv_rms_norm_qkv_bf16_mma_sm80(const mv_task *task, mv_error *error) {
    return norm_and_product<__nv_bfloat16>(task, error);
}

mv_status mv_rms_norm_qkv_f16_norm_mma_sm80(const mv_task *task, mv_error *error) {
    return norm_then_product(task, mv_rms_norm_f16_sm80, product<__half>, error);
}

mv_status mv_rms_norm_qkv_bf16_norm_mma_sm80(const mv_task *task, mv_error *error) {
    return norm_then_product(task, mv_rms_norm_bf16_sm80, product<__nv_bfloat16>, error);
}
}

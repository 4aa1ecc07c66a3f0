/* rms_norm_qkv_decode_sm80.cu: RMSNorm and the projection for a few tokens, in one kernel, at the speed of memory.
 *
 * At decode the weights move through the chip once and everything else must hide behind that. One block per SM. Each
 * warp owns whole rows of the weight, dealt out so that every SM gets its share whatever their number, and streams them
 * kUnroll packets of 16 bytes per lane at a time, two such loads always on their way. The first two are asked for
 * before the wait for the previous kernel, when the weights allow it (dynamic_weights is off).
 *
 * Meanwhile the block normalises the tokens once and keeps them as float32 in shared memory: in "hf" y exactly, after a
 * barrier that makes the row factor known; in "fp32" s * w without a rounding, and the row factor multiplies the
 * finished sum, which saves that barrier. Sums are float32, each lane's in order of k, then over lanes in a fixed tree.
 */
#include "cuda.h"
#include "launch.cuh"
#include "qkv_epilogue.cuh"
#include "reduce.cuh"
#include "rms_norm.cuh"

namespace {

constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kUnroll = 4;
constexpr int kMaxTokens = 4;
constexpr size_t kMaxSharedBytes = 96 * 1024; /* what every GPU from sm_80 on can give a block */

/* ---- the tokens, in shared memory ----------------------------------------------------------------------------- */

/* A lane multiplies 16 bytes of weights, 4 or 8 of them, by as many values. For 8 a token is kept as two planes, the
 * low and the high half of every 8 values: then neighbouring lanes read neighbouring 16 bytes, and no bank twice. */
template <int kSize> struct Tokens {
    float *y;
    int64_t stride; /* between tokens: the hidden size rounded up to 8 */

    __device__ __forceinline__ float *at(int token, int64_t k) const {
        float *row = y + token * stride;
        if constexpr (kSize == 4) return row + k;
        return row + (k % 8 / 4) * (stride / 2) + k / 8 * 4 + k % 4;
    }
    /* 4 values from column k + part on; k is a multiple of kSize. */
    __device__ __forceinline__ float4 quad(int token, int64_t k, int part) const {
        const float *row = y + token * stride;
        return *reinterpret_cast<const float4 *>(kSize == 4 ? row + k : row + part / 4 * (stride >> 1) + (k >> 1));
    }
};

constexpr int kPartials = kMaxTokens * kWarps;

__host__ __device__ inline int64_t padded(int64_t hidden) { return (hidden + 7) / 8 * 8; }

size_t shared_bytes(int tokens, int64_t hidden) {
    return (kPartials + static_cast<size_t>(tokens) * static_cast<size_t>(padded(hidden))) * sizeof(float);
}

struct Aligned {
    bool rows, norm_weight, weight; /* fit for 16-byte accesses */
};

/* Reads the tokens, adds the residual (block 0 writes the sum out), and leaves in shared memory what the weights are
 * multiplied by; gives the factors that are still to come after the sums. */
template <typename T, int kTokens, int kSize>
__device__ __forceinline__ void normalise_tokens(const mv_task &task, Aligned aligned, const Tokens<kSize> &tokens,
                                                 float *partial, float (&factor)[kTokens]) {
    constexpr int size = Packet<T>::size;
    constexpr int64_t step = kThreads * size;
    const int64_t first = static_cast<int64_t>(threadIdx.x) * size;
    const bool hf = task.rounding == MV_ROUNDING_HF;
    const bool writes_sum = task.residual_out.data && blockIdx.x == 0;

    float squares[kTokens] = {};
    for (int64_t k = first; k < tokens.stride; k += step) {
        const NormWeights<T> weights = load_norm_weights<T>(task, k, aligned.norm_weight);
#pragma unroll
        for (int t = 0; t < kTokens; t++) {
            const int64_t row = t < task.tokens ? t : 0;
            const int64_t count = t < task.tokens ? task.hidden - k : 0;
            Packet<T> s = load_packet(row_address<const T>(task.x, task.inner, row) + k, count, aligned.rows);
            if (task.residual.data) {
                const T *residual = row_address<const T>(task.residual, task.inner, row) + k;
                s = add_residual(s, load_packet(residual, count, aligned.rows));
                if (writes_sum)
                    store_packet(row_address<T>(task.residual_out, task.inner, row) + k, s, count, aligned.rows);
            }
#pragma unroll
            for (int i = 0; i < size; i++) {
                const float value = s.get(i);
                squares[t] = fmaf(value, value, squares[t]);
                if (k + i < tokens.stride) *tokens.at(t, k + i) = hf ? value : value * weights.v[i];
            }
        }
    }

#pragma unroll
    for (int t = 0; t < kTokens; t++) {
        const float sum = warp_sum(squares[t]);
        if (threadIdx.x % 32 == 0) partial[t * kWarps + threadIdx.x / 32] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < kTokens; t++) {
        float sum = 0;
#pragma unroll
        for (int warp = 0; warp < kWarps; warp++) sum += partial[t * kWarps + warp];
        factor[t] = row_factor(sum, task);
    }
    if (!hf) return;

    /* Each thread finishes the values that it put there itself. */
    for (int64_t k = first; k < tokens.stride; k += step) {
        const NormWeights<T> weights = load_norm_weights<T>(task, k, aligned.norm_weight);
#pragma unroll
        for (int t = 0; t < kTokens; t++) {
#pragma unroll
            for (int i = 0; i < size; i++) {
                if (k + i >= tokens.stride) break;
                float *value = tokens.at(t, k + i);
                *value = k + i < task.hidden ? round_to<T>(apply_norm<T>(*value, factor[t], weights.v[i], true)) : 0.0f;
            }
        }
    }
#pragma unroll
    for (int t = 0; t < kTokens; t++) factor[t] = 1;
    __syncthreads();
}

/* ---- the weights, on their way through registers ---------------------------------------------------------------- */

/* What a warp works on: kUnroll packets per lane of row n, from column k on. */
struct Place {
    int64_t n, k;
};

template <typename W> struct Stream {
    static constexpr int size = Packet<W>::size;
    static constexpr int64_t columns = 32 * kUnroll * size;

    const mv_task &task;
    const bool aligned;

    /* Rows are dealt out over the SMs first, then over the warps of an SM. */
    __device__ __forceinline__ Place first() const {
        return {static_cast<int64_t>(threadIdx.x / 32) * gridDim.x + blockIdx.x, 0};
    }
    __device__ __forceinline__ bool ends_row(Place p) const { return p.k + columns >= task.hidden; }
    __device__ __forceinline__ Place next(Place p) const {
        if (!ends_row(p)) return {p.n, p.k + columns};
        return {p.n + static_cast<int64_t>(gridDim.x) * kWarps, 0};
    }
    __device__ __forceinline__ int64_t column(Place p, int u) const {
        return p.k + (u * 32 + static_cast<int>(threadIdx.x % 32)) * size;
    }

    __device__ __forceinline__ void load(Place p, Packet<W> (&packets)[kUnroll]) const {
        if (p.n >= task.outputs) return;
        const W *row = weight_row<W>(task, find_output(task, p.n));
#pragma unroll
        for (int u = 0; u < kUnroll; u++) {
            const int64_t k = column(p, u);
            if (aligned) /* then the hidden size is a whole number of packets */
                packets[u] = k < task.hidden ? as_packet<W>(load_streaming(row + k)) : Packet<W>{};
            else
                packets[u] = load_packet(row + k, task.hidden - k, false);
        }
    }
};

template <typename W, int kTokens>
__device__ __forceinline__ void multiply(const Packet<W> &weights, const Tokens<Packet<W>::size> &tokens, int64_t k,
                                         float (&sum)[kTokens]) {
#pragma unroll
    for (int t = 0; t < kTokens; t++) {
#pragma unroll
        for (int part = 0; part < Packet<W>::size; part += 4) {
            const float4 y = tokens.quad(t, k, part);
            sum[t] = fmaf(y.x, weights.get(part + 0), sum[t]);
            sum[t] = fmaf(y.y, weights.get(part + 1), sum[t]);
            sum[t] = fmaf(y.z, weights.get(part + 2), sum[t]);
            sum[t] = fmaf(y.w, weights.get(part + 3), sum[t]);
        }
    }
}

/* ---- the kernel ------------------------------------------------------------------------------------------------- */

template <typename T, typename W, int kTokens>
__global__ void __launch_bounds__(kThreads, 1)
    rms_norm_qkv_decode_kernel(const __grid_constant__ mv_task task, Aligned aligned) {
    extern __shared__ float shared[];
    const Tokens<Packet<W>::size> tokens = {shared + kPartials, padded(task.hidden)};
    const Stream<W> stream = {task, aligned.weight};
    const int lane = threadIdx.x % 32;

    Place place = stream.first(), ahead = stream.next(place);
    Packet<W> now[kUnroll], soon[kUnroll];
    griddepcontrol_launch();
    prefetch_norm_weights<T>(task, static_cast<int64_t>(threadIdx.x) * Packet<T>::size);
    if (task.dynamic_weights) griddepcontrol_wait();
    stream.load(place, now);
    stream.load(ahead, soon);
    griddepcontrol_wait();

    float factor[kTokens], sum[kTokens] = {};
    normalise_tokens<T, kTokens>(task, aligned, tokens, shared, factor);

    while (place.n < task.outputs) {
#pragma unroll
        for (int u = 0; u < kUnroll; u++) {
            const int64_t k = stream.column(place, u);
            if (k < tokens.stride) multiply<W, kTokens>(now[u], tokens, k, sum);
            now[u] = soon[u];
        }
        const Place done = place;
        place = ahead;
        ahead = stream.next(ahead);
        stream.load(ahead, soon);
        if (!stream.ends_row(done)) continue;

        const float bias = load_bias<T>(task, find_output(task, done.n));
#pragma unroll
        for (int t = 0; t < kTokens; t++) {
            const float total = warp_sum(sum[t]) * factor[t];
            if (lane == t && t < task.tokens)
                row_address<T>(task.out, task.inner, t)[done.n] = finish_output<T>(total, bias);
            sum[t] = 0;
        }
    }
}

/* ---- launchers ------------------------------------------------------------------------------------------------ */

template <typename T, typename W, int kTokens> mv_status launch_decode(const mv_task *task, mv_error *error) {
    Aligned aligned = {norm_rows_aligned<T>(task), is_aligned16(task->norm_weight),
                       task->hidden % Packet<W>::size == 0};
    for (const mv_block &block : task->block)
        if (block.outputs)
            aligned.weight =
                aligned.weight && is_aligned16(block.weight) && block.row_stride % Packet<W>::size == 0;
    const Grid grid = {dim3(static_cast<unsigned>(task->sm_count)), kThreads, shared_bytes(kTokens, task->hidden)};
    return launch<rms_norm_qkv_decode_kernel<T, W, kTokens>>(task, grid, error, *task, aligned);
}

template <typename T, typename W> mv_status decode_tokens(const mv_task *task, mv_error *error) {
    if (task->tokens == 1) return launch_decode<T, W, 1>(task, error);
    if (task->tokens == 2) return launch_decode<T, W, 2>(task, error);
    return launch_decode<T, W, kMaxTokens>(task, error);
}

template <typename T> mv_status decode(const mv_task *task, mv_error *error) {
    if (task->weight_dtype == MV_F32) return decode_tokens<T, float>(task, error);
    return decode_tokens<T, T>(task, error);
}

} // namespace

extern "C" const char *mv_decode_fits(const mv_task *task) {
    if (task->tokens > kMaxTokens) return "it serves up to 4 tokens";
    if (task->block[0].col_stride != 1) return "it needs weights that are contiguous along the hidden size";
    const int tokens = task->tokens <= 2 ? static_cast<int>(task->tokens) : kMaxTokens;
    if (shared_bytes(tokens, task->hidden) > kMaxSharedBytes) return "its tokens do not fit in shared memory";
    return nullptr;
}

extern "C" mv_status mv_rms_norm_qkv_f32_decode_sm80(const mv_task *task, mv_error *error) {
    return decode_tokens<float, float>(task, error);
}
extern "C" mv_status mv_rms_norm_qkv_f16_decode_sm80(const mv_task *task, mv_error *error) {
    return decode<__half>(task, error);
}
extern "C" mv_status mv_rms_norm_qkv_bf16_decode_sm80(const mv_task *task, mv_error *error) {
    return decode<__nv_bfloat16>(task, error);
}

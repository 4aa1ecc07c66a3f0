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

    /* The 4 values from column k on; k is a multiple of 4. */
    __device__ __forceinline__ float4 *quad(int token, int64_t k) const {
        float *row = y + token * stride;
        return reinterpret_cast<float4 *>(kSize == 4 ? row + k : row + (k & 4 ? stride >> 1 : 0) + (k >> 3) * 4);
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
 * multiplied by; gives the factors that are still to come after the sums. `near` are the norm weights of this thread's
 * first packet, loaded ahead of time. */
template <typename T, int kTokens, int kSize>
__device__ __forceinline__ void normalise_tokens(const mv_task &task, Aligned aligned, const NormWeights<T> &near,
                                                 const Tokens<kSize> &tokens, float *partial,
                                                 float (&factor)[kTokens]) {
    constexpr int size = Packet<T>::size;
    constexpr int64_t step = kThreads * size;
    const int64_t first = static_cast<int64_t>(threadIdx.x) * size;
    const bool hf = task.rounding == MV_ROUNDING_HF;
    const bool writes_sum = task.residual_out.data && blockIdx.x == 0;
    const auto weights_at = [&](int64_t k) {
        return k == first ? near : load_norm_weights<T>(task, k, aligned.norm_weight);
    };

    float squares[kTokens] = {};
    for (int64_t k = first; k < tokens.stride; k += step) {
        const NormWeights<T> weights = weights_at(k);
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
            float value[size];
#pragma unroll
            for (int i = 0; i < size; i++) {
                value[i] = s.get(i);
                squares[t] = fmaf(value[i], value[i], squares[t]);
                if (!hf) value[i] *= weights.v[i];
            }
#pragma unroll
            for (int i = 0; i < size; i += 4)
                *tokens.quad(t, k + i) = make_float4(value[i], value[i + 1], value[i + 2], value[i + 3]);
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
        const NormWeights<T> weights = weights_at(k);
#pragma unroll
        for (int t = 0; t < kTokens; t++) {
#pragma unroll
            for (int i = 0; i < size; i += 4) {
                float4 *quad = tokens.quad(t, k + i);
                const float4 s = *quad;
                *quad = make_float4(round_to<T>(apply_norm<T>(s.x, factor[t], weights.v[i + 0], true)),
                                    round_to<T>(apply_norm<T>(s.y, factor[t], weights.v[i + 1], true)),
                                    round_to<T>(apply_norm<T>(s.z, factor[t], weights.v[i + 2], true)),
                                    round_to<T>(apply_norm<T>(s.w, factor[t], weights.v[i + 3], true)));
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

    /* The row that p is in; null past the last one. */
    __device__ __forceinline__ const W *row(Place p) const {
        return p.n < task.outputs ? weight_row<W>(task, find_output(task, p.n)) : nullptr;
    }
    __device__ __forceinline__ Packet<W> load(const W *row, int64_t k) const {
        if (!row || k >= task.hidden) return {};
        /* aligned: then the hidden size is a whole number of packets */
        return aligned ? as_packet<W>(load_streaming(row + k)) : load_packet(row + k, task.hidden - k, false);
    }
};

/* One step on its way: what was asked for, and the bias of its row. */
template <typename W> struct Step {
    Place place;
    Packet<W> packets[kUnroll];
    float bias;
};

template <typename W, int kTokens>
__device__ __forceinline__ void multiply(const Packet<W> &weights, const Tokens<Packet<W>::size> &tokens, int64_t k,
                                         float (&sum)[kTokens]) {
#pragma unroll
    for (int t = 0; t < kTokens; t++) {
#pragma unroll
        for (int part = 0; part < Packet<W>::size; part += 4) {
            const float4 y = *tokens.quad(t, k + part);
            sum[t] = fmaf(y.x, weights.get(part + 0), sum[t]);
            sum[t] = fmaf(y.y, weights.get(part + 1), sum[t]);
            sum[t] = fmaf(y.z, weights.get(part + 2), sum[t]);
            sum[t] = fmaf(y.w, weights.get(part + 3), sum[t]);
        }
    }
}

/* ---- the kernel ------------------------------------------------------------------------------------------------- */

template <typename T, typename W> __device__ __forceinline__ float bias_of(const Stream<W> &stream, Place place) {
    const mv_task &task = stream.task;
    return place.n < task.outputs ? load_bias<T>(task, find_output(task, place.n)) : 0.0f;
}

template <typename T, typename W> __device__ __forceinline__ void ask_for(const Stream<W> &stream, Step<W> &step) {
    const W *row = stream.row(step.place);
#pragma unroll
    for (int u = 0; u < kUnroll; u++) step.packets[u] = stream.load(row, stream.column(step.place, u));
    step.bias = bias_of<T>(stream, step.place);
}

/* Multiplies a step, each packet replaced as soon as it is used by one of the step after next, and writes the outputs
 * if it completes them. */
template <typename T, typename W, int kTokens>
__device__ __forceinline__ void advance(const Stream<W> &stream, const Tokens<Packet<W>::size> &tokens, Step<W> &step,
                                        Place after_next, const float (&factor)[kTokens], float (&sum)[kTokens]) {
    const mv_task &task = stream.task;
    const Place done = step.place;
    const float bias = step.bias;
    const W *row = stream.row(after_next);
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
        const int64_t k = stream.column(done, u);
        if (k < tokens.stride) multiply<W, kTokens>(step.packets[u], tokens, k, sum);
        step.packets[u] = stream.load(row, stream.column(after_next, u));
    }
    step.place = after_next;
    step.bias = bias_of<T>(stream, after_next);
    if (!stream.ends_row(done)) return;
#pragma unroll
    for (int t = 0; t < kTokens; t++) {
        const float total = warp_sum(sum[t]) * factor[t];
        if (static_cast<int>(threadIdx.x % 32) == t && t < task.tokens)
            row_address<T>(task.out, task.inner, t)[done.n] = finish_output<T>(total, bias);
        sum[t] = 0;
    }
}

template <typename T, typename W, int kTokens>
__global__ void __launch_bounds__(kThreads, 1)
    rms_norm_qkv_decode_kernel(const __grid_constant__ mv_task task, Aligned aligned) {
    extern __shared__ float shared[];
    const Tokens<Packet<W>::size> tokens = {shared + kPartials, padded(task.hidden)};
    const Stream<W> stream = {task, aligned.weight};

    Step<W> even, odd;
    even.place = stream.first();
    odd.place = stream.next(even.place);
    if (task.dynamic_weights) griddepcontrol_wait();
    ask_for<T>(stream, even);
    ask_for<T>(stream, odd);
    const NormWeights<T> near =
        load_norm_weights<T>(task, static_cast<int64_t>(threadIdx.x) * Packet<T>::size, aligned.norm_weight);
    griddepcontrol_wait();
    griddepcontrol_launch(); /* not earlier: kernels further down the stream would pile up on some of the SMs */

    float factor[kTokens], sum[kTokens] = {};
    normalise_tokens<T, kTokens>(task, aligned, near, tokens, shared, factor);

    while (even.place.n < task.outputs) {
        advance<T, W, kTokens>(stream, tokens, even, stream.next(odd.place), factor, sum);
        if (odd.place.n >= task.outputs) break;
        advance<T, W, kTokens>(stream, tokens, odd, stream.next(even.place), factor, sum);
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

/* rms_norm_sm80.cu: rms_norm and add_rms_norm at memory speed on everything from Ampere up.
 *
 * One read, one write. A row belongs to kThreads threads, each of which keeps kPackets 16-byte packets of it in
 * registers between the sum and the scaling; rows of up to 128 packets (1024 values of 16 bits) belong to one warp or
 * less and need no barrier. Rows of more than 2048 packets are read twice (with 1024 threads of 4 packets the residual
 * form spilled registers). Who adds what in which order depends on
 * the hidden size alone, so a row's bits do not depend on its neighbours, its alignment or its strides.
 *
 * Norm weights are on their way to L2 before the wait for the previous kernel, and into registers with the row itself.
 */
#include "launch.cuh"
#include "reduce.cuh"
#include "rms_norm.cuh"

namespace {

template <typename T> struct Norm {
    Rows<const T> x, residual;
    Rows<T> out, residual_out;
    const void *weight;
    int64_t tokens, inner;
    int32_t hidden;
    float inverse_hidden, eps, weight_offset;
    mv_dtype weight_dtype;
    bool hf, one_level;
    bool rows_aligned, weight_aligned;
};

/* A packet's worth of norm weights, with the offset, as float. */
template <typename T> struct Weights {
    float v[Packet<T>::size];
};

template <typename T> __device__ __forceinline__ Weights<T> load_weights(const Norm<T> &n, int64_t at) {
    constexpr int size = Packet<T>::size;
    Weights<T> weights;
    if (n.weight_dtype == Dtype<T>::value) {
        const T *p = static_cast<const T *>(n.weight) + at;
        const Packet<T> packet = load_packet(p, n.hidden - at, n.weight_aligned);
#pragma unroll
        for (int i = 0; i < size; i++) weights.v[i] = n.weight_offset + to_float(packet.v[i]);
    } else {
        const float *p = static_cast<const float *>(n.weight) + at;
#pragma unroll
        for (int part = 0; part < size; part += 4) {
            const Packet<float> packet = load_packet(p + part, n.hidden - at - part, n.weight_aligned);
#pragma unroll
            for (int i = 0; i < 4 && part + i < size; i++) weights.v[part + i] = n.weight_offset + packet.v[i];
        }
    }
    return weights;
}

template <typename T> __device__ __forceinline__ float sum_of_squares(const Packet<T> &packet) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < Packet<T>::size; i++) {
        const float value = to_float(packet.v[i]);
        sum = fmaf(value, value, sum);
    }
    return sum;
}

/* Loads the packet of s at column `at`: x, or rn(x + residual). */
template <typename T, bool kAdd>
__device__ __forceinline__ Packet<T> add_packets(Packet<T> x, const Packet<T> &residual) {
    if constexpr (kAdd) {
#pragma unroll
        for (int i = 0; i < Packet<T>::size; i++) x.v[i] = add_residual(x.v[i], residual.v[i]);
    }
    return x;
}

template <typename T>
__device__ __forceinline__ Packet<T> normalise(const Packet<T> &s, float r, const Weights<T> &weights, bool hf) {
    Packet<T> y;
#pragma unroll
    for (int i = 0; i < Packet<T>::size; i++)
        y.v[i] = from_float<T>(apply_norm<T>(to_float(s.v[i]), r, weights.v[i], hf));
    return y;
}

/* The sum over the kThreads threads of a row. */
template <int kThreads> __device__ __forceinline__ float row_sum(float v) {
    if constexpr (kThreads <= 32) {
        return warp_sum<kThreads>(v);
    } else {
        __shared__ float partial[kThreads / 32];
        return block_sum<kThreads>(v, partial);
    }
}

/* Rows of a warp or less share a block of 128 threads, and none of them meets at a barrier. */
template <int kThreads> constexpr int kBlockThreads = kThreads <= 32 ? 128 : kThreads;

template <typename T, int kThreads, int kPackets, bool kAdd>
__global__ void __launch_bounds__(kBlockThreads<kThreads>) rms_norm_kernel(Norm<T> n) {
    constexpr int size = Packet<T>::size;
    const int lane = threadIdx.x % kThreads;
    const int64_t place = static_cast<int64_t>(blockIdx.x) * (kBlockThreads<kThreads> / kThreads) +
                          threadIdx.x / kThreads;
    const int64_t row = place < n.tokens ? place : 0;
    const int hidden = place < n.tokens ? n.hidden : 0; /* past the last row: nothing to read, add or write */

#pragma unroll
    for (int p = 0; p < kPackets; p++) {
        const int at = (p * kThreads + lane) * size;
        if (at < hidden)
            prefetch_l2(static_cast<const char *>(n.weight) + at * (n.weight_dtype == MV_F32 ? sizeof(float) : sizeof(T)));
    }
    griddepcontrol_launch();
    griddepcontrol_wait();

    const T *x = n.x.row(row, n.inner, n.one_level);
    const T *residual = kAdd ? n.residual.row(row, n.inner, n.one_level) : nullptr;
    Packet<T> s[kPackets], other[kAdd ? kPackets : 1];
#pragma unroll
    for (int p = 0; p < kPackets; p++) {
        const int at = (p * kThreads + lane) * size;
        s[p] = load_packet(x + at, hidden - at, n.rows_aligned);
        if constexpr (kAdd) other[p] = load_packet(residual + at, hidden - at, n.rows_aligned);
    }
    float sum = 0;
#pragma unroll
    for (int p = 0; p < kPackets; p++) {
        s[p] = add_packets<T, kAdd>(s[p], other[kAdd ? p : 0]);
        sum += sum_of_squares(s[p]);
    }
    if (kAdd && n.residual_out.data) {
        T *residual_out = n.residual_out.row(row, n.inner, n.one_level);
#pragma unroll
        for (int p = 0; p < kPackets; p++) {
            const int at = (p * kThreads + lane) * size;
            store_packet(residual_out + at, s[p], hidden - at, n.rows_aligned);
        }
    }

    const float r = row_factor(row_sum<kThreads>(sum), n.inverse_hidden, n.eps);
    T *out = n.out.row(row, n.inner, n.one_level);
#pragma unroll
    for (int p = 0; p < kPackets; p++) {
        const int at = (p * kThreads + lane) * size;
        if (at < hidden)
            store_packet(out + at, normalise(s[p], r, load_weights(n, at), n.hf), hidden - at, n.rows_aligned);
    }
}

/* Any hidden size: s is read again, from residual_out where there is one (x may be overwritten by it, then). */
constexpr int kLongRowThreads = 1024;

template <typename T, bool kAdd> __global__ void __launch_bounds__(kLongRowThreads) rms_norm_long_kernel(Norm<T> n) {
    constexpr int size = Packet<T>::size;
    constexpr int64_t step = kLongRowThreads * size;
    const int64_t row = blockIdx.x;
    griddepcontrol_launch();
    griddepcontrol_wait();

    const T *x = n.x.row(row, n.inner, n.one_level);
    const T *residual = kAdd ? n.residual.row(row, n.inner, n.one_level) : nullptr;
    T *residual_out = kAdd && n.residual_out.data ? n.residual_out.row(row, n.inner, n.one_level) : nullptr;
    T *out = n.out.row(row, n.inner, n.one_level);
    const int64_t first = static_cast<int64_t>(threadIdx.x) * size;

    float sum = 0;
    for (int64_t at = first; at < n.hidden; at += step) {
        const int64_t left = n.hidden - at;
        Packet<T> s = load_packet(x + at, left, n.rows_aligned);
        if constexpr (kAdd) {
            s = add_packets<T, kAdd>(s, load_packet(residual + at, left, n.rows_aligned));
            if (residual_out) store_packet(residual_out + at, s, left, n.rows_aligned);
        }
        sum += sum_of_squares(s);
    }
    const float r = row_factor(row_sum<kLongRowThreads>(sum), n.inverse_hidden, n.eps);
    for (int64_t at = first; at < n.hidden; at += step) {
        const int64_t left = n.hidden - at;
        Packet<T> s = load_packet(residual_out ? residual_out + at : x + at, left, n.rows_aligned);
        if constexpr (kAdd)
            if (!residual_out) s = add_packets<T, kAdd>(s, load_packet(residual + at, left, n.rows_aligned));
        store_packet(out + at, normalise(s, r, load_weights(n, at), n.hf), left, n.rows_aligned);
    }
}

/* ---- launchers ------------------------------------------------------------------------------------------------ */

template <typename T, int kThreads, int kPackets>
mv_status launch_rows(const mv_task *task, const Norm<T> &n, mv_error *error) {
    constexpr int threads = kBlockThreads<kThreads>;
    constexpr int64_t rows_per_block = threads / kThreads;
    const int64_t blocks = (n.tokens + rows_per_block - 1) / rows_per_block;
    const Grid grid = {dim3(static_cast<unsigned>(blocks)), threads, 0};
    return n.residual.data ? launch<rms_norm_kernel<T, kThreads, kPackets, true>>(task, grid, error, n)
                           : launch<rms_norm_kernel<T, kThreads, kPackets, false>>(task, grid, error, n);
}

template <typename T> mv_status launch_long_rows(const mv_task *task, const Norm<T> &n, mv_error *error) {
    const Grid grid = {dim3(static_cast<unsigned>(n.tokens)), kLongRowThreads, 0};
    return n.residual.data ? launch<rms_norm_long_kernel<T, true>>(task, grid, error, n)
                           : launch<rms_norm_long_kernel<T, false>>(task, grid, error, n);
}

/* Threads for a row by its packets: 4 packets a thread keep enough bytes in flight; short rows take part of a warp. */
template <typename T> mv_status launch_by_hidden(const mv_task *task, const Norm<T> &n, mv_error *error) {
    const int64_t packets = (static_cast<int64_t>(n.hidden) + Packet<T>::size - 1) / Packet<T>::size;
    if (packets <= 16) return launch_rows<T, 16, 1>(task, n, error);
    if (packets <= 32) return launch_rows<T, 32, 1>(task, n, error);
    if (packets <= 128) return launch_rows<T, 32, 4>(task, n, error);
    if (packets <= 256) return launch_rows<T, 64, 4>(task, n, error);
    if (packets <= 512) return launch_rows<T, 128, 4>(task, n, error);
    if (packets <= 1024) return launch_rows<T, 256, 4>(task, n, error);
    if (packets <= 2048) return launch_rows<T, 512, 4>(task, n, error);
    return launch_long_rows<T>(task, n, error);
}

constexpr int64_t kMaxRowsPerLaunch = int64_t{1} << 30; /* a grid has at most 2^31 - 1 blocks */

template <typename T> mv_status rms_norm(const mv_task *task, mv_error *error) {
    if (task->hidden > INT32_MAX - 65536)
        return mv_fail(error, MV_BAD_VALUE, "rms_norm: hidden is %lld, the CUDA kernels take up to 2^31 - 65537",
                       static_cast<long long>(task->hidden));
    const auto absent_or_aligned = [](mv_rows rows) { return !rows.data || rows_aligned16(rows, sizeof(T)); };
    Norm<T> n = {};
    n.x = as_rows<const T>(task->x);
    n.residual = as_rows<const T>(task->residual);
    n.out = as_rows<T>(task->out);
    n.residual_out = as_rows<T>(task->residual_out);
    n.weight = task->norm_weight;
    n.tokens = task->tokens;
    n.inner = task->inner;
    n.hidden = static_cast<int32_t>(task->hidden);
    n.inverse_hidden = 1.0f / static_cast<float>(task->hidden);
    n.eps = task->eps;
    n.weight_offset = task->weight_offset;
    n.weight_dtype = task->norm_weight_dtype;
    n.hf = task->rounding == MV_ROUNDING_HF;
    n.one_level = task->inner == task->tokens;
    n.rows_aligned = rows_aligned16(task->x, sizeof(T)) && absent_or_aligned(task->residual) &&
                     rows_aligned16(task->out, sizeof(T)) && absent_or_aligned(task->residual_out);
    n.weight_aligned = is_aligned16(task->norm_weight);
    if (n.tokens <= kMaxRowsPerLaunch) return launch_by_hidden<T>(task, n, error);
    return mv_fail(error, MV_BAD_VALUE, "rms_norm: x has %lld rows, the CUDA kernels take up to 2^30",
                   static_cast<long long>(n.tokens));
}

} // namespace

extern "C" mv_status mv_rms_norm_f32_sm80(const mv_task *task, mv_error *error) { return rms_norm<float>(task, error); }
extern "C" mv_status mv_rms_norm_f16_sm80(const mv_task *task, mv_error *error) { return rms_norm<__half>(task, error); }
extern "C" mv_status mv_rms_norm_bf16_sm80(const mv_task *task, mv_error *error) {
    return rms_norm<__nv_bfloat16>(task, error);
}

/* rms_norm_sm80.cu: rms_norm and add_rms_norm at memory speed on everything from Ampere up.
 *
 * One read, one write. A row belongs to kThreads threads, each of which keeps kPackets 16-byte packets of it in
 * registers between the sum and the scaling; rows of up to 32 packets belong to one warp or less and need no barrier.
 * Rows of more than 4096 packets are read twice. Who adds what in which order depends on the hidden size alone, so a
 * row's bits do not depend on its neighbours, its alignment or its strides.
 *
 * Norm weights are on their way before the wait for the previous kernel, but where a thread holds 4 packets and as many
 * of a residual, whose registers they take over when it is added. */
#include "launch.cuh"
#include "reduce.cuh"
#include "rms_norm.cuh"

namespace {

struct Access {
    bool rows, weight; /* fit for 16-byte accesses */
    bool keep;         /* L2 drops x last, and so writes back out earlier */
    bool past_l1;      /* x and residual, few rows of them */
};

/* x is kept where it is larger than L2 by so many times. (Where a product follows, it shall find y there.) */
constexpr int64_t kKeptTimes = 2;

template <typename T> __device__ __forceinline__ float sum_of_squares(const Packet<T> &packet) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < Packet<T>::size; i++) {
        const float value = packet.get(i);
        sum = fmaf(value, value, sum);
    }
    return sum;
}

/* The sum over a row of what its kThreads threads have of each of their packets. One warp with 4 packets a lane adds as
 * 4 warps with one would. */
template <int kThreads, int kPackets> __device__ __forceinline__ float row_sum(float (&v)[kPackets]) {
    if constexpr (kThreads == 32 && kPackets > 1) {
#pragma unroll
        for (int p = 0; p < kPackets; p++) v[p] = warp_sum(v[p]);
        return pairwise_sum<kPackets>(v);
    }
    float sum = 0;
#pragma unroll
    for (int p = 0; p < kPackets; p++) sum += v[p];
    if constexpr (kThreads <= 32) {
        return warp_sum<kThreads>(sum);
    } else {
        __shared__ float partial[kThreads / 32];
        return block_sum<kThreads>(sum, partial);
    }
}

/* Rows of a warp or less share a block of 128 threads, and none of them meets at a barrier. */
template <int kThreads> constexpr int kBlockThreads = kThreads <= 32 ? 128 : kThreads;

/* Blocks that shall share an SM: 48 or 64 KB of rows are on their way. 0: the compiler's choice (1 is another: it then
 * takes as many registers as it likes). */
template <int kThreads, int kPackets, bool kAdd> constexpr int kMinBlocks = 0;
template <> constexpr int kMinBlocks<512, 2, false> = 3;
template <> constexpr int kMinBlocks<512, 4, false> = 2;
template <> constexpr int kMinBlocks<32, 4, true> = 8;

template <typename T, int kThreads, int kPackets, bool kAdd>
__global__ void __launch_bounds__(kBlockThreads<kThreads>, (kMinBlocks<kThreads, kPackets, kAdd>))
    rms_norm_kernel(const __grid_constant__ mv_task task, Access access) {
    constexpr int size = Packet<T>::size;
    const bool hf = task.rounding == MV_ROUNDING_HF;
    const int lane = threadIdx.x % kThreads;
    const int64_t place =
        static_cast<int64_t>(blockIdx.x) * (kBlockThreads<kThreads> / kThreads) + threadIdx.x / kThreads;
    const int64_t row = place < task.tokens ? place : 0;
    /* past the last row: nothing to read, to add or to write */
    const int hidden = place < task.tokens ? static_cast<int>(task.hidden) : 0;

    /* Weights do not depend on the kernel before. In x's dtype they are held as loaded, to be there when r is. */
    if (task.dynamic_weights) griddepcontrol_wait();
    const bool early = task.norm_weight_dtype == Dtype<T>::value;
    constexpr bool kWeightsLast = kAdd && kPackets == 4;
    Packet<T> raw_weights[kPackets];
    const auto load_weights = [&] {
        if (!early) return;
#pragma unroll
        for (int p = 0; p < kPackets; p++)
            raw_weights[p] = load_raw_norm_weights<T>(task, (p * kThreads + lane) * size, access.weight);
    };
    if (!kWeightsLast) load_weights();
    /* A warp for a row of 4 packets a lane: every row is on its way at once. */
    constexpr bool kPastL1 = kAdd && kThreads == 32 && kPackets > 1;
    constexpr bool kKeeps = !kAdd && kThreads * kPackets >= 512;
    const uint64_t policy = kKeeps ? l2_policy(access.keep) : 0;
    const auto load = [&](const T *from, int left) {
        if constexpr (kKeeps) return load_packet(from, left, access.rows, policy);
        if constexpr (kAdd) return load_packet(from, left, access.rows, kPastL1 || access.past_l1);
        return load_packet(from, left, access.rows);
    };
    if (task.launch_early) griddepcontrol_launch();
    griddepcontrol_wait();
    clear_counters(task);
    griddepcontrol_launch(); /* not earlier: kernels further down the stream would pile up on some of the SMs */

    const T *x = row_address<const T>(task.x, task.inner, row);
    const T *residual = kAdd ? row_address<const T>(task.residual, task.inner, row) : nullptr;
    Packet<T> s[kPackets], other[kAdd ? kPackets : 1];
#pragma unroll
    for (int p = 0; p < kPackets; p++) {
        const int at = (p * kThreads + lane) * size;
        s[p] = load(x + at, hidden - at);
        if constexpr (kAdd) other[p] = load(residual + at, hidden - at);
    }
    float squares[kPackets];
#pragma unroll
    for (int p = 0; p < kPackets; p++) {
        if constexpr (kAdd) s[p] = add_residual(s[p], other[p]);
        squares[p] = sum_of_squares(s[p]);
    }
    if (kWeightsLast) load_weights();
    if (kAdd && task.residual_out.data) {
        T *residual_out = row_address<T>(task.residual_out, task.inner, row);
#pragma unroll
        for (int p = 0; p < kPackets; p++) {
            const int at = (p * kThreads + lane) * size;
            store_packet(residual_out + at, s[p], hidden - at, access.rows);
        }
    }

    const float r = row_factor<T>(row_sum<kThreads>(squares), task);
    T *out = row_address<T>(task.out, task.inner, row);
#pragma unroll
    for (int p = 0; p < kPackets; p++) {
        const int at = (p * kThreads + lane) * size;
        if (at >= hidden) break;
        const NormWeights<T> weights =
            early ? widen_norm_weights<T>(task, raw_weights[p]) : load_norm_weights<T>(task, at, access.weight);
        store_packet(out + at, apply_norm(s[p], r, weights, hf), hidden - at, access.rows);
    }
}

/* Any hidden size: s is read again, from residual_out where there is one (x may be overwritten by it, then). */
constexpr int kLongRowThreads = 1024;

template <typename T, bool kAdd> __global__ void __launch_bounds__(kLongRowThreads)
    rms_norm_long_kernel(const __grid_constant__ mv_task task, Access access) {
    constexpr int size = Packet<T>::size;
    constexpr int64_t step = kLongRowThreads * size;
    const int64_t row = blockIdx.x;
    const bool hf = task.rounding == MV_ROUNDING_HF;
    if (task.launch_early) griddepcontrol_launch();
    griddepcontrol_wait();
    clear_counters(task);
    griddepcontrol_launch();

    const T *x = row_address<const T>(task.x, task.inner, row);
    const T *residual = kAdd ? row_address<const T>(task.residual, task.inner, row) : nullptr;
    T *residual_out = kAdd && task.residual_out.data ? row_address<T>(task.residual_out, task.inner, row) : nullptr;
    T *out = row_address<T>(task.out, task.inner, row);
    const int64_t first = static_cast<int64_t>(threadIdx.x) * size;

    float squares[1] = {};
    for (int64_t at = first; at < task.hidden; at += step) {
        const int64_t left = task.hidden - at;
        Packet<T> s = load_packet(x + at, left, access.rows);
        if constexpr (kAdd) {
            s = add_residual(s, load_packet(residual + at, left, access.rows));
            if (residual_out) store_packet(residual_out + at, s, left, access.rows);
        }
        squares[0] += sum_of_squares(s);
    }
    const float r = row_factor<T>(row_sum<kLongRowThreads>(squares), task);
    for (int64_t at = first; at < task.hidden; at += step) {
        const int64_t left = task.hidden - at;
        Packet<T> s = load_packet(residual_out ? residual_out + at : x + at, left, access.rows);
        if constexpr (kAdd)
            if (!residual_out) s = add_residual(s, load_packet(residual + at, left, access.rows));
        store_packet(out + at, apply_norm(s, r, load_norm_weights<T>(task, at, access.weight), hf), left, access.rows);
    }
}

/* ---- launchers ------------------------------------------------------------------------------------------------ */

template <typename T, bool kAdd, int kThreads, int kPackets>
mv_status launch_rows(const mv_task *task, Access access, mv_error *error) {
    constexpr int threads = kBlockThreads<kThreads>;
    constexpr int64_t rows_per_block = threads / kThreads;
    const int64_t blocks = (task->tokens + rows_per_block - 1) / rows_per_block;
    const Grid grid = {static_cast<unsigned>(blocks), threads, 0};
    return launch<rms_norm_kernel<T, kThreads, kPackets, kAdd>>(task, grid, error, *task, access);
}

template <typename T, bool kAdd> mv_status launch_long_rows(const mv_task *task, Access access, mv_error *error) {
    const Grid grid = {static_cast<unsigned>(task->tokens), kLongRowThreads, 0};
    return launch<rms_norm_long_kernel<T, kAdd>>(task, grid, error, *task, access);
}

/* Threads for a row by its packets, as measured on an H100 (SPEED.md): 2 packets a thread are faster than 4, but more
 * blocks on an SM than have 48 KB on their way are slower than fewer. Short rows take part of a warp. */
template <typename T> mv_status launch_plain(const mv_task *task, Access access, mv_error *error) {
    const int64_t packets = (task->hidden + Packet<T>::size - 1) / Packet<T>::size;
    if (packets <= 16) return launch_rows<T, false, 16, 1>(task, access, error);
    if (packets <= 32) return launch_rows<T, false, 32, 1>(task, access, error);
    if (packets <= 128) return launch_rows<T, false, 64, 2>(task, access, error);
    if (packets <= 256 && sizeof(T) == 4) return launch_rows<T, false, 256, 1>(task, access, error);
    if (packets <= 256) return launch_rows<T, false, 128, 2>(task, access, error);
    if (packets <= 512) return launch_rows<T, false, 256, 2>(task, access, error);
    if (packets <= 1024) return launch_rows<T, false, 512, 2>(task, access, error);
    if (packets <= 2048) return launch_rows<T, false, 512, 4>(task, access, error);
    if (packets <= 4096) return launch_rows<T, false, 1024, 4>(task, access, error);
    return launch_long_rows<T, false>(task, access, error);
}

/* With a residual 1 packet a thread is faster than 2 up to 256. */
template <typename T> mv_status launch_add(const mv_task *task, Access access, mv_error *error) {
    const int64_t packets = (task->hidden + Packet<T>::size - 1) / Packet<T>::size;
    access.past_l1 = task->tokens <= task->sm_count;
    if (packets <= 16) return launch_rows<T, true, 16, 1>(task, access, error);
    if (packets <= 32) return launch_rows<T, true, 32, 1>(task, access, error);
    /* More rows than 16 blocks an SM take at once, but not many times as many: a warp each. The bits are the same. */
    if (packets > 96 && packets <= 128 && task->tokens > 16 * task->sm_count && task->tokens <= 64 * task->sm_count)
        return launch_rows<T, true, 32, 4>(task, access, error);
    if (packets <= 128) return launch_rows<T, true, 128, 1>(task, access, error);
    if (packets <= 256) return launch_rows<T, true, 256, 1>(task, access, error);
    if (packets <= 512) return launch_rows<T, true, 256, 2>(task, access, error);
    if (packets <= 1024) return launch_rows<T, true, 512, 2>(task, access, error);
    if (packets <= 2048) return launch_rows<T, true, 1024, 2>(task, access, error);
    if (packets <= 4096) return launch_rows<T, true, 1024, 4>(task, access, error);
    return launch_long_rows<T, true>(task, access, error);
}

template <typename T> mv_status rms_norm(const mv_task *task, mv_error *error) {
    if (task->hidden > INT32_MAX - 65536)
        return mv_fail(error, MV_BAD_VALUE, "rms_norm: hidden is %lld, the CUDA kernels take up to 2^31 - 65537",
                       static_cast<long long>(task->hidden));
    if (task->tokens > INT32_MAX) /* as many blocks as a grid may have */
        return mv_fail(error, MV_BAD_VALUE, "rms_norm: x has %lld rows, the CUDA kernels take fewer than 2^31",
                       static_cast<long long>(task->tokens));
    const int64_t bytes = task->tokens * task->hidden * static_cast<int64_t>(sizeof(T));
    const Access access = {norm_rows_aligned<T>(task) && rows_aligned16(task->out, sizeof(T)),
                           is_aligned16(task->norm_weight), bytes >= kKeptTimes * task->l2_bytes && !task->launch_early,
                           false};
    return task->residual.data ? launch_add<T>(task, access, error) : launch_plain<T>(task, access, error);
}

} // namespace

extern "C" mv_status mv_rms_norm_f32_sm80(const mv_task *task, mv_error *error) { return rms_norm<float>(task, error); }
extern "C" mv_status mv_rms_norm_f16_sm80(const mv_task *task, mv_error *error) {
    return rms_norm<__half>(task, error);
}
extern "C" mv_status mv_rms_norm_bf16_sm80(const mv_task *task, mv_error *error) {
    return rms_norm<__nv_bfloat16>(task, error);
}

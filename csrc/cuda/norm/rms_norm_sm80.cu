/* rms_norm_sm80.cu: rms_norm, add_rms_norm and norm_add at memory speed on everything from Ampere up.
 *
 * One read, one write. A row belongs to kThreads threads, each of which keeps kPackets 16-byte packets of it in
 * registers between the sum and the scaling; rows of up to 32 packets belong to one warp or less and need no barrier.
 * Rows of more than 4096 packets are read twice. Who adds what in which order depends on the hidden size alone, so a
 * row's bits do not depend on its neighbours, its alignment or its strides.
 *
 * Before the wait for the previous kernel, which may still write the norm weights, a thread finds out where its row is,
 * and L2 is asked for the weights. They are loaded together with x; but where a thread holds 4 packets and as many of a
 * residual, the weights take over those registers, and with 1024 threads a residual that joins behind the norm is
 * loaded there. Rows of whole packets have kernels of their own, without the code for the others. */
#include "cuda/arch/launch.cuh"
#include "cuda/arch/reduce.cuh"
#include "cuda/norm/rms_norm.cuh"

namespace {

/* What becomes of a residual: the norm sees its sum with x, or it is added to what the norm gives. */
enum class Residual { kNone, kBefore, kBehind };

struct NormAccess {
    bool whole;        /* whole packets, fit for 16-byte accesses, and weights of x's dtype: the fast path */
    bool rows, weight; /* fit for 16-byte accesses */
    bool keep;         /* L2 drops x last, and so writes back out earlier */
    float mean_scale;
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
template <int kThreads, int kPackets, Residual kResidual> constexpr int kMinBlocks = 0;
template <> constexpr int kMinBlocks<512, 2, Residual::kNone> = 3;
template <> constexpr int kMinBlocks<512, 4, Residual::kNone> = 2;
template <> constexpr int kMinBlocks<32, 4, Residual::kBefore> = 8;

/* kTurns: a block takes a row after the other, as many rows apart as there are blocks. */
template <typename T, int kThreads, int kPackets, Residual kResidual, bool kWhole, bool kTurns>
__global__ void __launch_bounds__(kBlockThreads<kThreads>, (kMinBlocks<kThreads, kPackets, kResidual>))
    rms_norm_kernel(const __grid_constant__ mv_task task, NormAccess access) {
    constexpr int size = Packet<T>::size;
    constexpr bool kAdd = kResidual == Residual::kBefore, kTwo = kResidual != Residual::kNone;
    const bool twice = mv_norm_rounds_twice(task.rounding);
    const int lane = threadIdx.x % kThreads;
    const int64_t place =
        static_cast<int64_t>(blockIdx.x) * (kBlockThreads<kThreads> / kThreads) + threadIdx.x / kThreads;
    int64_t row = place < task.tokens ? place : 0;
    /* past the last row: nothing to read, to add or to write */
    const int hidden = place < task.tokens ? static_cast<int>(task.hidden) : 0;
    const auto at = [lane](int p) { return (p * kThreads + lane) * size; };

    /* Before the wait: where things are does not depend on the kernel before. */
    const T *x, *residual;
    T *residual_out, *out;
    const auto find_row = [&] {
        x = row_address<const T>(task.x, task.inner, row);
        residual = kTwo ? row_address<const T>(kAdd ? task.norm.residual : task.norm.added, task.inner, row) : nullptr;
        residual_out =
            kAdd && task.norm.residual_out.data ? row_address<T>(task.norm.residual_out, task.inner, row) : nullptr;
        out = row_address<T>(task.out, task.inner, row);
    };
    find_row();
    if constexpr (kPackets < 4) { /* else registers are short */
        compute_now(x);
        compute_now(residual);
        compute_now(residual_out);
        compute_now(out);
    }
    prefetch_norm_weight(task);
    constexpr bool kKeeps = !kTwo && kThreads * kPackets >= 512;
    const uint64_t policy = kKeeps ? l2_policy(access.keep) : 0;
    if (task.next.launch_early) griddepcontrol_launch();
    griddepcontrol_wait();
    clear_counters(task);
    griddepcontrol_launch(); /* not earlier: kernels further down the stream would pile up on some of the SMs */

    Packet<T> weights[kPackets];
    const auto load_weights = [&] {
        if constexpr (kWhole) {
#pragma unroll
            for (int p = 0; p < kPackets; p++)
                weights[p] = as_packet<T>(load_if(static_cast<const T *>(task.norm.weight) + at(p), at(p) < hidden));
        }
    };
    constexpr bool kWeightsLast = kTwo && kPackets == 4;
    constexpr bool kResidualLast = kResidual == Residual::kBehind && kPackets == 4 && kThreads == 1024;
    if (!kWeightsLast) load_weights();
    /* A warp for a row of 4 packets a lane: every row is on its way at once. */
    constexpr bool kPastL1 = kTwo && kThreads == 32 && kPackets > 1;
    const auto load = [&](const T *from, int p) {
        const bool wanted = at(p) < hidden;
        if constexpr (!kWhole) return load_packet(from + at(p), hidden - at(p), access.rows);
        if constexpr (kKeeps) return as_packet<T>(load_by_policy(from + at(p), wanted, policy));
        return as_packet<T>(kPastL1 ? load_past_l1(from + at(p), wanted) : load_if(from + at(p), wanted));
    };
    const auto store = [&](T *to, int p, const Packet<T> &packet) {
        if (at(p) < hidden) store_packet(to + at(p), packet, kWhole ? size : hidden - at(p), kWhole || access.rows);
    };
    for (;;) {
        Packet<T> s[kPackets], other[kTwo ? kPackets : 1];
#pragma unroll
        for (int p = 0; p < kPackets; p++) {
            s[p] = load(x, p);
            if constexpr (kTwo && !kResidualLast) other[p] = load(residual, p);
        }
        float squares[kPackets];
#pragma unroll
        for (int p = 0; p < kPackets; p++) {
            if constexpr (kAdd) s[p] = add_residual(s[p], other[p]);
            squares[p] = sum_of_squares(s[p]);
        }
        if (kWeightsLast) load_weights();
        if (kAdd && residual_out) {
#pragma unroll
            for (int p = 0; p < kPackets; p++) store(residual_out, p, s[p]);
        }

        const float r = row_factor<T>(row_sum<kThreads>(squares), access.mean_scale, task);
        const auto normalised = [&](int p) {
            if constexpr (!kWhole)
                return apply_norm(s[p], r, load_norm_weights_or_ones<T>(task, at(p), access.weight), twice);
            if constexpr (sizeof(T) == 2)
                if (twice && task.norm.weight_offset == 0) return apply_norm_hf(s[p], r, weights[p]);
            return apply_norm(s[p], r, widen_norm_weights<T>(task, weights[p]), twice);
        };
#pragma unroll
        for (int p = 0; p < kPackets; p++) {
            if (at(p) >= hidden) break;
            if constexpr (kResidual == Residual::kBehind) {
                const NormWeights<T> own = kWhole ? widen_norm_weights<T>(task, weights[p])
                                                  : load_norm_weights_or_ones<T>(task, at(p), access.weight);
                const Packet<T> added = kResidualLast ? load(residual, p) : other[p];
                store(out, p, apply_norm_and_add(s[p], r, own, task.rounding, added));
                continue;
            }
            store_normalised(task, normalised(p),
                             [&](const Packet<T> &y, int64_t behind) { store(out + behind, p, y); });
        }
        if constexpr (!kTurns) break;
        row += gridDim.x;
        if (row >= task.tokens) break;
        find_row();
        __syncthreads(); /* all have read the sum of the row before */
    }
}

/* Any hidden size: s is read again, from residual_out where there is one (x may be overwritten by it, then). */
constexpr int kLongRowThreads = 1024;

template <typename T, Residual kResidual> __global__ void __launch_bounds__(kLongRowThreads)
    rms_norm_long_kernel(const __grid_constant__ mv_task task, NormAccess access) {
    constexpr bool kAdd = kResidual == Residual::kBefore;
    constexpr int size = Packet<T>::size;
    constexpr int64_t step = kLongRowThreads * size;
    const int64_t row = blockIdx.x;
    const bool twice = mv_norm_rounds_twice(task.rounding);
    prefetch_norm_weight(task);
    if (task.next.launch_early) griddepcontrol_launch();
    griddepcontrol_wait();
    clear_counters(task);
    griddepcontrol_launch();

    const T *x = row_address<const T>(task.x, task.inner, row);
    const T *residual = kAdd ? row_address<const T>(task.norm.residual, task.inner, row) : nullptr;
    T *residual_out =
        kAdd && task.norm.residual_out.data ? row_address<T>(task.norm.residual_out, task.inner, row) : nullptr;
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
        const NormWeights<T> weights = load_norm_weights_or_ones<T>(task, at, access.weight);
        if constexpr (kResidual == Residual::kBehind) {
            const Packet<T> added =
                load_packet(row_address<const T>(task.norm.added, task.inner, row) + at, left, access.rows);
            store_packet(out + at, apply_norm_and_add(s, r, weights, task.rounding, added), left, access.rows);
            continue;
        }
        store_normalised(task, apply_norm(s, r, weights, twice), [&](const Packet<T> &y, int64_t behind) {
            store_packet(out + behind + at, y, left, access.rows);
        });
    }
}

/* ---- launchers ------------------------------------------------------------------------------------------------ */

/* Many short rows before a product: so many blocks an SM, each with up to so many rows in turn, leave room for the
 * product's own, which then wait for y and not for a place; and few blocks start sooner than many. */
constexpr int kTurnBlocks = 16, kMostTurns = 4;

template <typename T, Residual kResidual, int kThreads, int kPackets>
mv_status launch_norm_rows(const mv_task *task, NormAccess access, mv_error *error) {
    constexpr int threads = kBlockThreads<kThreads>;
    constexpr int64_t rows_per_block = threads / kThreads;
    const int64_t blocks = (task->tokens + rows_per_block - 1) / rows_per_block;
    Grid grid = {static_cast<unsigned>(blocks), threads, 0};
    if constexpr (sizeof(T) == 2 && kResidual == Residual::kNone && kThreads == 64) {
        const int64_t fewest = (blocks + kMostTurns - 1) / kMostTurns, most = int64_t{kTurnBlocks} * task->sm_count;
        if (task->next.launch_early && access.whole && blocks > most) {
            grid.blocks = static_cast<unsigned>(fewest > most ? fewest : most);
            return launch<rms_norm_kernel<T, kThreads, kPackets, kResidual, true, true>>(task, grid, error, *task,
                                                                                         access);
        }
    }
    if (access.whole)
        return launch<rms_norm_kernel<T, kThreads, kPackets, kResidual, true, false>>(task, grid, error, *task, access);
    return launch<rms_norm_kernel<T, kThreads, kPackets, kResidual, false, false>>(task, grid, error, *task, access);
}

template <typename T, Residual kResidual>
mv_status launch_long_rows(const mv_task *task, NormAccess access, mv_error *error) {
    const Grid grid = {static_cast<unsigned>(task->tokens), kLongRowThreads, 0};
    return launch<rms_norm_long_kernel<T, kResidual>>(task, grid, error, *task, access);
}

/* Threads for a row by its packets, as measured on an H100 (docs/speed/norms.md): 2 packets a thread are faster than 4,
 * but more blocks on an SM than have 48 KB on their way are slower than fewer. Short rows take part of a warp. */
template <typename T> mv_status launch_plain(const mv_task *task, NormAccess access, mv_error *error) {
    const int64_t packets = (task->hidden + Packet<T>::size - 1) / Packet<T>::size;
    if (packets <= 16) return launch_norm_rows<T, Residual::kNone, 16, 1>(task, access, error);
    if (packets <= 32) return launch_norm_rows<T, Residual::kNone, 32, 1>(task, access, error);
    if (packets <= 128) return launch_norm_rows<T, Residual::kNone, 64, 2>(task, access, error);
    if (packets <= 256 && sizeof(T) == 4) return launch_norm_rows<T, Residual::kNone, 256, 1>(task, access, error);
    if (packets <= 256) return launch_norm_rows<T, Residual::kNone, 128, 2>(task, access, error);
    if (packets <= 512) return launch_norm_rows<T, Residual::kNone, 256, 2>(task, access, error);
    if (packets <= 1024) return launch_norm_rows<T, Residual::kNone, 512, 2>(task, access, error);
    if (packets <= 2048) return launch_norm_rows<T, Residual::kNone, 512, 4>(task, access, error);
    if (packets <= 4096) return launch_norm_rows<T, Residual::kNone, 1024, 4>(task, access, error);
    return launch_long_rows<T, Residual::kNone>(task, access, error);
}

/* With a residual 1 packet a thread is faster than 2 up to 512. */
template <typename T, Residual kResidual>
mv_status launch_add(const mv_task *task, NormAccess access, mv_error *error) {
    const int64_t packets = (task->hidden + Packet<T>::size - 1) / Packet<T>::size;
    if (packets <= 16) return launch_norm_rows<T, kResidual, 16, 1>(task, access, error);
    if (packets <= 32) return launch_norm_rows<T, kResidual, 32, 1>(task, access, error);
    /* More rows than 16 blocks an SM take at once, but not many times as many: a warp each. The bits are the same. */
    if (packets > 96 && packets <= 128 && task->tokens > 16 * task->sm_count && task->tokens <= 64 * task->sm_count)
        return launch_norm_rows<T, kResidual, 32, 4>(task, access, error);
    if (packets <= 128) return launch_norm_rows<T, kResidual, 128, 1>(task, access, error);
    if (packets <= 256) return launch_norm_rows<T, kResidual, 256, 1>(task, access, error);
    if (packets <= 512) return launch_norm_rows<T, kResidual, 512, 1>(task, access, error);
    if (packets <= 1024) return launch_norm_rows<T, kResidual, 512, 2>(task, access, error);
    if (packets <= 2048) return launch_norm_rows<T, kResidual, 1024, 2>(task, access, error);
    if (packets <= 4096) return launch_norm_rows<T, kResidual, 1024, 4>(task, access, error);
    return launch_long_rows<T, kResidual>(task, access, error);
}

template <typename T> mv_status rms_norm(const mv_task *task, mv_error *error) {
    if (task->hidden > INT32_MAX - 65536)
        return mv_fail(error, MV_BAD_VALUE, "rms_norm: hidden is %lld, the CUDA kernels take up to 2^31 - 65537",
                       static_cast<long long>(task->hidden));
    if (task->tokens > INT32_MAX) /* as many blocks as a grid may have */
        return mv_fail(error, MV_BAD_VALUE, "rms_norm: x has %lld rows, the CUDA kernels take fewer than 2^31",
                       static_cast<long long>(task->tokens));
    NormAccess access = {};
    access.rows = norm_rows_aligned<T>(task) && rows_aligned16(task->out, sizeof(T));
    access.weight = is_aligned16(task->norm.weight);
    access.whole = access.rows && access.weight && task->norm.weight && task->norm.weight_dtype == Dtype<T>::value &&
                   task->hidden % Packet<T>::size == 0;
    access.keep = task->tokens * task->hidden * static_cast<int64_t>(sizeof(T)) >= kKeptTimes * task->l2_bytes &&
                  !task->next.launch_early;
    access.mean_scale = mean_scale<T>(*task);
    if (task->norm.residual.data) return launch_add<T, Residual::kBefore>(task, access, error);
    if (task->norm.added.data) return launch_add<T, Residual::kBehind>(task, access, error);
    return launch_plain<T>(task, access, error);
}

} // namespace

extern "C" mv_status mv_rms_norm_f32_sm80(const mv_task *task, const mv_decision *, mv_error *error) {
    return rms_norm<float>(task, error);
}
extern "C" mv_status mv_rms_norm_f16_sm80(const mv_task *task, const mv_decision *, mv_error *error) {
    return rms_norm<__half>(task, error);
}
extern "C" mv_status mv_rms_norm_bf16_sm80(const mv_task *task, const mv_decision *, mv_error *error) {
    return rms_norm<__nv_bfloat16>(task, error);
}

/* rms_norm.cuh: what every kernel that begins with the norm shares: rows, norm weights, the formula, its roundings. */
#pragma once

#include "cuda/arch/mma.cuh"
#include "cuda/arch/vec.cuh"

/* As many norm weights as a packet has values, with the offset, as float; zeros past the hidden size. */
template <typename T> struct NormWeights { float v[Packet<T>::size]; };

template <typename T>
__device__ __forceinline__ NormWeights<T> widen_norm_weights(const mv_task &task, const Packet<T> &packet) {
    NormWeights<T> weights;
#pragma unroll
    for (int i = 0; i < Packet<T>::size; i++) weights.v[i] = task.norm.weight_offset + packet.get(i);
    return weights;
}

template <typename T, Through kThrough = Through::kL1>
__device__ __forceinline__ NormWeights<T> load_norm_weights(const mv_task &task, int64_t at, bool aligned) {
    if (task.norm.weight_dtype == Dtype<T>::value)
        return widen_norm_weights<T>(
            task, load_packet<T, kThrough>(static_cast<const T *>(task.norm.weight) + at, task.hidden - at, aligned));
    const float *p = static_cast<const float *>(task.norm.weight) + at;
    NormWeights<T> weights;
#pragma unroll
    for (int part = 0; part < Packet<T>::size; part += 4) {
        const Packet<float> packet = load_packet<float, kThrough>(p + part, task.hidden - at - part, aligned);
#pragma unroll
        for (int i = 0; i < 4; i++) weights.v[part + i] = task.norm.weight_offset + packet.get(i);
    }
    return weights;
}

/* The same of a norm op, which may have none: ones. */
template <typename T>
__device__ __forceinline__ NormWeights<T> load_norm_weights_or_ones(const mv_task &task, int64_t at, bool aligned) {
    if (task.norm.weight) return load_norm_weights<T>(task, at, aligned);
    NormWeights<T> weights;
#pragma unroll
    for (int i = 0; i < Packet<T>::size; i++) weights.v[i] = task.norm.weight_offset + 1;
    return weights;
}

/* By one thread of a launch, before the wait for the previous kernel: the norm weights are in L2 after it. */
__device__ __forceinline__ void prefetch_norm_weight(const mv_task &task) {
    if (blockIdx.x == 0 && threadIdx.x == 0 && task.norm.weight)
        prefetch_l2(task.norm.weight, task.hidden * (task.norm.weight_dtype == MV_F32 ? 4 : 2));
}

/* rn(x + residual): what the norm sees and residual_out gets. */
template <typename T> __device__ __forceinline__ T add_residual(T x, T residual) {
    return from_float<T>(to_float(x) + to_float(residual));
}

template <typename T> __device__ __forceinline__ Packet<T> add_residual(const Packet<T> &x, const Packet<T> &residual) {
    float sum[Packet<T>::size];
#pragma unroll
    for (int i = 0; i < Packet<T>::size; i++) sum[i] = x.get(i) + residual.get(i);
    return pack<T>(sum);
}

/* What the mean of a row's squares takes: 16 bits multiply their sum by this, float32 divides it. */
template <typename T> __host__ __device__ __forceinline__ float mean_scale(int64_t columns) {
    const float count = static_cast<float>(columns);
    return sizeof(T) == 4 ? count : 1.0f / count;
}
template <typename T> __host__ __device__ __forceinline__ float mean_scale(const mv_task &task) {
    return mean_scale<T>(task.hidden);
}

/* 1 / sqrt(mean + eps): of float32 rows with every step correctly rounded, for 16 bits within two units in the last
 * place, as torch.rsqrt gives it. */
template <typename T> __device__ __forceinline__ float row_factor(float sum_of_squares, float scale, float eps) {
    if constexpr (sizeof(T) == 4)
        return __frsqrt_rn(__fdiv_rn(sum_of_squares, scale) + eps);
    else
        return rsqrtf(sum_of_squares * scale + eps);
}
template <typename T>
__device__ __forceinline__ float row_factor(float sum_of_squares, float scale, const mv_task &task) {
    return row_factor<T>(sum_of_squares, scale, task.norm.eps);
}
template <typename T> __device__ __forceinline__ float row_factor(float sum_of_squares, const mv_task &task) {
    return row_factor<T>(sum_of_squares, mean_scale<T>(task), task);
}

/* s * r * (offset + w); twice: s * r is rounded. The result still has to be rounded to T. */
template <typename T> __device__ __forceinline__ float apply_norm(float s, float r, float weight, bool twice) {
    const float normalised = s * r;
    return (twice ? round_to<T>(normalised) : normalised) * weight;
}

template <typename T> __device__ __forceinline__ Packet<T> apply_norm(const Packet<T> &s, float r,
                                                                      const NormWeights<T> &weights, bool twice) {
    float y[Packet<T>::size];
#pragma unroll
    for (int i = 0; i < Packet<T>::size; i++) y[i] = s.get(i) * r;
    if (twice) { /* by packs: the instruction that rounds two values is much faster than the one for one */
        const Packet<T> rounded = pack<T>(y);
#pragma unroll
        for (int i = 0; i < Packet<T>::size; i++) y[i] = rounded.get(i);
    }
#pragma unroll
    for (int i = 0; i < Packet<T>::size; i++) y[i] *= weights.v[i];
    return pack<T>(y);
}

/* rn(residual + y), y rounded first but in "fp32". */
template <typename T>
__device__ __forceinline__ Packet<T> apply_norm_and_add(const Packet<T> &s, float r, const NormWeights<T> &weights,
                                                        mv_rounding rounding, const Packet<T> &residual) {
    if (mv_rounds_each_step(rounding))
        return add_residual(apply_norm(s, r, weights, mv_norm_rounds_twice(rounding)), residual);
    float y[Packet<T>::size];
#pragma unroll
    for (int i = 0; i < Packet<T>::size; i++) y[i] = s.get(i) * r * weights.v[i] + residual.get(i);
    return pack<T>(y);
}

/* Stores y: `store` gets a packet and how far behind its place it goes. Of float32 it may be the nearest TF32,
 * and what that leaves beside it: nothing of infinity. The largest values have no TF32 above them: the one below. */
template <typename T, typename Store>
__device__ __forceinline__ void store_normalised(const mv_task &task, const Packet<T> &y, Store store) {
    if constexpr (sizeof(T) == 4) {
        if (task.next.low_plane) {
            Packet<T> high, low;
#pragma unroll
            for (int i = 0; i < Packet<T>::size; i++) {
                high.word[i] = round_tf32(y.get(i));
                if (isinf(high.get(i))) high.word[i] = y.word[i] & 0xffffe000u;
                low.word[i] = isinf(high.get(i)) ? 0 : round_tf32(y.get(i) - high.get(i));
            }
            store(high, int64_t{0});
            if (!task.linear.allow_tf32) store(low, task.next.low_plane);
            return;
        }
    }
    store(y, int64_t{0});
}

/* By one of the CTAs, after the wait: zeroes what the next kernel of a plan counts with. */
__device__ __forceinline__ void clear_counters(const mv_task &task) {
    if (blockIdx.x != 0) return;
    for (int64_t i = threadIdx.x; i < task.next.counter_count; i += blockDim.x) task.next.counters[i] = 0;
}

/* y of 16 bits as "hf" without an offset wants it, in few instructions: float32 holds the product of two 16-bit values
 * exactly, so one instruction multiplies and rounds two of them as apply_norm would. */
template <typename T>
__device__ __forceinline__ Packet<T> apply_norm_hf(const Packet<T> &s, float r, const Packet<T> &weights) {
    Packet<T> y;
#pragma unroll
    for (int w = 0; w < 4; w++) {
        const float normalised[2] = {s.get(2 * w) * r, s.get(2 * w + 1) * r};
        y.word[w] = multiply_pair<T>(pack_word<T>(normalised), weights.word[w]);
    }
    return y;
}

/* Host: are these rows, where they exist, all fit for 16-byte accesses? */
template <typename T> static inline bool norm_rows_aligned(const mv_task *task) {
    const auto fits = [](mv_rows rows) { return !rows.data || rows_aligned16(rows, sizeof(T)); };
    return fits(task->x) && fits(task->norm.residual) && fits(task->norm.residual_out) && fits(task->norm.added);
}

/* epilogue.cuh: where the outputs of a linear layer live, and how a finished sum becomes one of them:
 *
 *   out = rn(sum + bias), or with an addend rn(rn(rn(sum + bias) * scale) + addend)
 *
 * or of a gated layer what activation.cuh makes of two. The outputs of a task are numbered through q | k | v; those of
 * a gated layer are the first of the gate, the first of up, the second of the gate, and so on. When the three blocks
 * are one packed matrix the number is the row of that matrix; otherwise it has to be looked up, which a kernel does
 * once per output of its tile. */
#pragma once

#include "cuda/activation/activation.cuh"
#include "cuda/norm/rms_norm.cuh"

/* Output n of a task: row `row` of block `block`. */
struct OutputPlace {
    int block;
    int64_t row;
};

__device__ __forceinline__ OutputPlace find_output(const mv_task &task, int64_t n) {
    if (task.linear.gated) return {static_cast<int>(n % 2), n / 2};
    OutputPlace place = {0, n};
    if (task.linear.packed) return place;
    while (place.block < 2 && place.row >= task.linear.block[place.block].outputs)
        place.row -= task.linear.block[place.block++].outputs;
    return place;
}

/* The address of W[n][0]. */
template <typename W> __device__ __forceinline__ const W *weight_row(const mv_task &task, OutputPlace place) {
    const mv_block &block = task.linear.block[place.block];
    return static_cast<const W *>(block.weight) + place.row * block.row_stride;
}

template <typename T> __device__ __forceinline__ float load_bias(const mv_task &task, OutputPlace place) {
    const mv_block &block = task.linear.block[place.block];
    return block.bias ? load_as_past_l1<T>(block.bias, block.bias_dtype, place.row) : 0.0f;
}

/* Without an addend: the bias joins in float32, then the one rounding. */
template <typename T> __device__ __forceinline__ T finish_output(float sum, float bias) {
    return from_float<T>(sum + bias);
}

/* How an addend joins an output: without inner roundings, or with one, or where there is a scale with two. */
enum class Joining { kOnce, kRounded, kScaled };
template <Joining kHow> struct KnownJoining { static constexpr Joining value = kHow; };

/* The output has its bias, and is not rounded yet. */
template <typename T, Joining kHow> __device__ __forceinline__ float join_addend(float out, float addend, float scale) {
    if constexpr (kHow == Joining::kOnce) return fmaf(out, scale, addend);
    out = round_to<T>(out);
    if constexpr (kHow == Joining::kScaled) out = round_to<T>(__fmul_rn(out, scale)); /* never a fused multiply-add */
    return out + addend;
}

/* Calls act with how the addends of a task join, as a constant. */
template <typename Act> __device__ __forceinline__ auto with_joining(float scale, bool once, const Act &act) {
    if (once) return act(KnownJoining<Joining::kOnce>{});
    if (scale == 1) return act(KnownJoining<Joining::kRounded>{});
    return act(KnownJoining<Joining::kScaled>{});
}
template <typename Act> __device__ __forceinline__ auto with_joining(const mv_task &task, const Act &act) {
    return with_joining(task.linear.scale, !mv_rounds_each_step(task.rounding), act);
}
template <typename T> __device__ __forceinline__ float join_addend(const mv_task &task, float out, float addend) {
    return with_joining(task, [=](auto known) { return join_addend<T, known.value>(out, addend, task.linear.scale); });
}

/* The addends of a token. Kernels in front may write them, so they are read after the wait for those; and past L1, by
 * who stores the outputs, which may lie at the same place. */
template <typename T> __device__ __forceinline__ const T *addend_row(const mv_task &task, int64_t token) {
    return row_address<const T>(task.linear.addend, task.inner, token);
}

template <typename T> __device__ __forceinline__ float load_addend(const mv_task &task, int64_t token, int64_t n) {
    return to_float(load_past_l1(addend_row<T>(task, token) + n));
}

/* An output of a task that may have addends: this is what was loaded, if so. */
template <typename T>
__device__ __forceinline__ T finish_output(const mv_task &task, float sum, float bias, float addend) {
    if (!task.linear.addend.data) return finish_output<T>(sum, bias);
    return from_float<T>(join_addend<T>(task, sum + bias, addend));
}
/* The same of output n of a token, whose addend is loaded only now. */
template <typename T>
__device__ __forceinline__ T finish_output(const mv_task &task, int64_t token, int64_t n, float sum, float bias) {
    return finish_output<T>(task, sum, bias, task.linear.addend.data ? load_addend<T>(task, token, n) : 0.0f);
}

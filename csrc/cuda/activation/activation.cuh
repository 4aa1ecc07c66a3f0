/* activation.cuh: the activations of silu_and_mul, gelu_and_mul and gated layers. */
#pragma once

#include "cuda/arch/vec.cuh"

/* Puts the activations of some gates in their place; tests/c/activation.h says how near they are. A result waits for
 * exp and for a reciprocal, so those of all are asked for together. An eighth of 1 + exp is infinite, or has a normal
 * reciprocal. */
template <mv_activation kActivation, int kCount> __device__ __forceinline__ void activate(float (&z)[kCount]) {
    if constexpr (kActivation == MV_GELU) {
#pragma unroll
        for (int i = 0; i < kCount; i++) z[i] *= normcdff(z[i]);
    } else {
        constexpr float linear = -0x1.988454p0f, cubic = -0x1.2444f2p-4f; /* -2 sqrt(2 / pi), and 0.044715 of that */
        float r[kCount];
#pragma unroll
        for (int i = 0; i < kCount; i++)
            r[i] = expf(kActivation == MV_SILU ? -z[i] : z[i] * fmaf(z[i] * z[i], cubic, linear));
#pragma unroll
        for (int i = 0; i < kCount; i++) r[i] = reciprocal(fmaf(r[i], 0.125f, 0.125f));
#pragma unroll
        for (int i = 0; i < kCount; i++) z[i] *= 0.125f * r[i];
    }
}

/* Outputs of a gated layer, from the finished sums of the gate, whose place they take, and of up: activation(gate) *
 * up, not rounded yet, where all but "fp32" round gate, up and the activation. */
template <typename T, mv_activation kActivation, int kCount>
__device__ __forceinline__ void join_up(const mv_task &task, float (&gate)[kCount], const float (&up)[kCount]) {
    const bool rounds = mv_rounds_each_step(task.rounding);
    const auto rounded = [=](float v) { return rounds ? round_to<T>(v) : v; };
#pragma unroll
    for (int i = 0; i < kCount; i++) gate[i] = rounded(gate[i]);
    activate<kActivation>(gate);
#pragma unroll
    for (int i = 0; i < kCount; i++) gate[i] = rounded(gate[i]) * rounded(up[i]);
}
template <typename T, mv_activation kActivation>
__device__ __forceinline__ T finish_gated(const mv_task &task, float gate, float up) {
    float gates[1] = {gate}, ups[1] = {up};
    join_up<T, kActivation>(task, gates, ups);
    return from_float<T>(gates[0]);
}
template <mv_activation kActivation> struct KnownActivation { static constexpr mv_activation value = kActivation; };

/* Calls act with the activation of a task, as a constant. */
template <typename Act> __device__ __forceinline__ auto with_activation(const mv_task &task, const Act &act) {
    if (task.activation == MV_SILU) return act(KnownActivation<MV_SILU>{});
    if (task.activation == MV_GELU_TANH) return act(KnownActivation<MV_GELU_TANH>{});
    return act(KnownActivation<MV_GELU>{});
}
template <typename T> __device__ __forceinline__ T finish_gated(const mv_task &task, float gate, float up) {
    return with_activation(task, [&](auto known) { return finish_gated<T, known.value>(task, gate, up); });
}

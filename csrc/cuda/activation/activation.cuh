/* activation.cuh: the activations of silu_and_mul, gelu_and_mul and gated layers. */
#pragma once

#include "cuda/arch/vec.cuh"

/* tests/c/activation.h says how near these are. */
template <mv_activation kActivation> __device__ __forceinline__ float activation(float z) {
    constexpr float linear = -0x1.988454p0f, cubic = -0x1.2444f2p-4f; /* -2 sqrt(2 / pi), and 0.044715 of that */
    if constexpr (kActivation == MV_SILU) return z / (1 + expf(-z));
    if constexpr (kActivation == MV_GELU_TANH) return z / (1 + expf(z * fmaf(z * z, cubic, linear)));
    return z * normcdff(z);
}

/* An output of a gated layer, from the finished sums of the gate and of up: rn(activation(gate) * up), where all
 * but "fp32" round gate, up and the activation, too. */
template <typename T, mv_activation kActivation>
__device__ __forceinline__ T finish_gated(const mv_task &task, float gate, float up) {
    const bool rounds = mv_rounds_each_step(task.rounding);
    if (rounds) gate = round_to<T>(gate), up = round_to<T>(up);
    float active = activation<kActivation>(gate);
    if (rounds) active = round_to<T>(active);
    return from_float<T>(active * up);
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

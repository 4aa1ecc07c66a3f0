/* reduce.cuh: sums in a fixed order, so that they are the same bits every time. */
#pragma once

/* The sum over a warp's lanes, or over groups of kLanes of them; every lane of the group gets it. */
template <int kLanes = 32> __device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
    return v;
}

/* The sum of kCount values, in pairs: a chain would add an error for each. */
template <int kCount> __device__ __forceinline__ float pairwise_sum(const float *v) {
    if constexpr (kCount == 1)
        return v[0];
    else
        return pairwise_sum<kCount / 2>(v) + pairwise_sum<kCount / 2>(v + kCount / 2);
}

/* The sum over a block of kThreads; every thread gets it. `partial`: kThreads / 32 floats of shared memory, not in use
 * by anyone when this is called. */
template <int kThreads> __device__ __forceinline__ float block_sum(float v, float *partial) {
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    __syncthreads();
    return pairwise_sum<kThreads / 32>(partial);
}

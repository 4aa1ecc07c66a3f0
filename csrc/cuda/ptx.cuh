/* ptx.cuh: one PTX instruction, one function. Instructions younger than the GPU a kernel is compiled for become nothing
 * where that is right (programmatic launch is an overlap, not a meaning). */
#pragma once

#include <cstdint>

/* Waits until the kernels this one depends on have finished and their writes are visible. */
__device__ __forceinline__ void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* Lets the next kernel of the stream start while this one runs; it still waits for this one's writes. */
__device__ __forceinline__ void griddepcontrol_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* 16 bytes that are read once, such as weights: they take no room in L1. */
__device__ __forceinline__ uint4 load_streaming(const void *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

/* Brings the line of p to L2, without waiting. p may be any address of readable memory. */
__device__ __forceinline__ void prefetch_l2(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

/* ptx.cuh: one PTX instruction, one function. Instructions younger than the GPU a kernel is compiled for become nothing
 * where that is right (programmatic launch is an overlap, not a meaning). */
#pragma once

#include <cstdint>
#include <cstring>

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

/* Asks L2 for `bytes` bytes from p on, as far as they are whole multiples of 16: nothing is returned, so nothing that
 * is still being written can be read too early. GPUs without programmatic launch have nothing to do ahead of time. */
__device__ __forceinline__ void prefetch_l2(const void *p, int64_t bytes) {
#if __CUDA_ARCH__ >= 900
    const uint64_t first = (reinterpret_cast<uint64_t>(p) + 15) / 16 * 16;
    const int64_t whole = (static_cast<int64_t>(reinterpret_cast<uint64_t>(p) - first) + bytes) / 16 * 16;
    if (whole > 0)
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(first), "r"(static_cast<uint32_t>(whole)));
#endif
}

/* 16 bytes by a load instruction, zeros unless `wanted`, without a branch; then what the load clobbers. */
#define MV_LOAD_IF(value, instruction, p, wanted, ...)                                                                 \
    asm volatile("{\n"                                                                                                 \
                 ".reg .pred wanted;\n"                                                                                \
                 "setp.ne.u32 wanted, %5, 0;\n"                                                                        \
                 "mov.u32 %0, 0;\n"                                                                                    \
                 "mov.u32 %1, 0;\n"                                                                                    \
                 "mov.u32 %2, 0;\n"                                                                                    \
                 "mov.u32 %3, 0;\n"                                                                                    \
                 "@wanted " instruction ".v4.u32 {%0, %1, %2, %3}, [%4];\n"                                            \
                 "}"                                                                                                   \
                 : "=&r"(value.x), "=&r"(value.y), "=&r"(value.z), "=&r"(value.w)                                      \
                 : "l"(p), "r"(static_cast<uint32_t>(wanted))                                                          \
                 : __VA_ARGS__)

/* What is read once, such as weights: it takes no room in L1. (Never by ld.global.nc: a kernel may begin while the one
 * before it still writes the weights, and they change during its life then.) */
__device__ __forceinline__ uint4 load_streaming(const void *p, bool wanted) {
    uint4 v;
    MV_LOAD_IF(v, "ld.global.L1::no_allocate", p, wanted, );
    return v;
}
__device__ __forceinline__ uint4 load_if(const void *p, bool wanted) {
    uint4 v;
    MV_LOAD_IF(v, "ld.global", p, wanted, "memory");
    return v;
}
__device__ __forceinline__ uint4 load_past_l1(const void *p, bool wanted) {
    uint4 v;
    MV_LOAD_IF(v, "ld.global.L1::no_allocate", p, wanted, "memory");
    return v;
}

/* 1 / v of a normal number, off by a unit in the last place at most. */
__device__ __forceinline__ float reciprocal(float v) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
    return result;
}

/* One value past L1, of 2, 4, 8 or 16 bytes. This is not __ldcg, whose asm is not volatile for 16-bit floats: the
 * compiler has moved one in front of the wait for the kernel before, and out of the condition that guarded it. */
template <typename T> __device__ __forceinline__ T load_past_l1(const T *p) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    T value;
    if constexpr (sizeof(T) == 2) {
        uint16_t bits;
        asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(bits) : "l"(p) : "memory");
        memcpy(&value, &bits, sizeof bits);
    } else if constexpr (sizeof(T) == 4) {
        uint32_t bits;
        asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(bits) : "l"(p) : "memory");
        memcpy(&value, &bits, sizeof bits);
    } else if constexpr (sizeof(T) == 8) {
        uint2 bits;
        asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(bits.x), "=r"(bits.y) : "l"(p) : "memory");
        memcpy(&value, &bits, sizeof bits);
    } else {
        uint4 bits;
        asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                     : "l"(p)
                     : "memory");
        memcpy(&value, &bits, sizeof bits);
    }
    return value;
}

/* What the kernel in front may still be writing: good only to aim a prefetch, within bounds that are checked. It does
 * not stay in L1, where the load that counts would find it. */
template <typename T> __device__ __forceinline__ T load_to_aim(const T *p) { return load_past_l1(p); }

/* How soon L2 drops what a load brings: as usual, or after everything else. */
__device__ __forceinline__ uint64_t l2_policy(bool last) {
    uint64_t policy;
    if (last)
        asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    else
        asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ uint4 load_by_policy(const void *p, bool wanted, uint64_t policy) {
    uint4 v = {};
    if (wanted)
        asm volatile("ld.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "l"(p), "l"(policy)
                     : "memory");
    return v;
}

/* What this thread wrote before, and what it has seen others write at a barrier, is seen by who reads the counter. */
__device__ __forceinline__ void add_release(uint32_t *counter, uint32_t value) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}
/* The same, by one who sees what those before have written; gives what the counter was. */
__device__ __forceinline__ uint32_t add_acquire_release(uint32_t *counter, uint32_t value) {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
    return before;
}
__device__ __forceinline__ uint32_t load_acquire(const uint32_t *counter) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
}

/* True for one lane of a whole warp: the compiler knows that it is one. */
__device__ __forceinline__ bool elect_lane() {
    uint32_t elected = 0;
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n.reg .pred elected;\nelect.sync _|elected, 0xffffffff;\nselp.u32 %0, 1, 0, elected;\n}"
                 : "=r"(elected));
#endif
    return elected != 0;
}

/* What all lanes of a warp have alike, in a uniform register: the compiler then knows that they do, and computes the
 * branches, addresses and descriptors that follow from it where instructions want them. */
__device__ __forceinline__ uint32_t uniform(uint32_t value) { return __shfl_sync(0xffffffffu, value, 0); }

/* Has the compiler compute a value here, and not later where it is used. */
template <typename T> __device__ __forceinline__ void compute_now(T *&pointer) { asm volatile("" : "+l"(pointer)); }
__device__ __forceinline__ void compute_now(int &number) { asm volatile("" : "+r"(number)); }

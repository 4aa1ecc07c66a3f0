/* mma.cuh: the instructions of an Ampere matrix product, one per function: asynchronous copies to shared memory,
 * matrix loads from it, and the product of 16-bit fragments with float32 sums. Shared memory is addressed by 32-bit
 * offsets. */
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

__device__ __forceinline__ uint32_t shared_address(const void *p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

/* Copies 16 bytes, past L1; with `valid` false it writes 16 zero bytes and reads nothing. */
__device__ __forceinline__ void cp_async16(uint32_t to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

/* The same of what is read once: L2 drops it before anything else. policy: l2_evict_first(). */
__device__ __forceinline__ uint64_t l2_evict_first() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ void cp_async16_once(uint32_t to, const void *from, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(policy)
                 : "memory");
}

/* The same for rows whose next bytes others ask for soon: L2 brings 128 at once. */
__device__ __forceinline__ void cp_async16_of_128(uint32_t to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}

/* Closes the group of copies started since the last one; an empty group is complete. */
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/* Waits until at most kPending of this thread's youngest groups are still under way. */
template <int kPending> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/* The same of a number known at run time; of 13 or more it waits for all. */
__device__ __forceinline__ void cp_async_wait_all_but(int pending) {
    switch (pending) {
#define MV_CASE(n)                                                                                                     \
    case n: cp_async_wait<n>(); break;
        MV_CASE(1)
        MV_CASE(2)
        MV_CASE(3)
        MV_CASE(4)
        MV_CASE(5)
        MV_CASE(6)
        MV_CASE(7)
        MV_CASE(8)
        MV_CASE(9)
        MV_CASE(10)
        MV_CASE(11)
        MV_CASE(12)
#undef MV_CASE
    default: cp_async_wait<0>(); break;
    }
}

/* Four 8x8 matrices of 16-bit values: lane l gives the address of row l % 8 of matrix l / 8, and receives of each
 * matrix the values 2 (l % 4) and 2 (l % 4) + 1 of row l / 4. */
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&m)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row)
                 : "memory");
}

/* The same of the transposed matrices. */
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&m)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row)
                 : "memory");
}

/* The transpose of an 8x8 matrix of 16-bit values, of which lane l has values 2 (l % 4) and 2 (l % 4) + 1 of row l / 4,
 * before and after. */
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t m) {
    uint32_t turned;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(m));
    return turned;
}

/* sum[16][8] += a[16][16] * b[16][8]. Lane l holds of a: rows l / 4 and l / 4 + 8, columns 2 (l % 4) + {0, 1} and those
 * + 8; of b: column l / 4, rows 2 (l % 4) + {0, 1} and those + 8; of sum: rows l / 4 and l / 4 + 8, columns
 * 2 (l % 4) + {0, 1}. */
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <> __device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&sum)[4], const uint32_t (&a)[4],
                                                                        uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <> __device__ __forceinline__ void mma_m16n8k16<__half>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                                                 uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* The nearest TF32, ties away from zero: 11 of the 24 bits, where a float has them. */
__device__ __forceinline__ uint32_t round_tf32(float v) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
    return bits;
}

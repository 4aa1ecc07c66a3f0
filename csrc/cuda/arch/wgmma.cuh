/* wgmma.cuh: Hopper's matrix product of a warpgroup, one instruction per function. Both operands lie in shared memory
 * and are named by descriptors; the sums are registers. Products run on their own until they are awaited. */
#pragma once

#include "cuda/arch/mma.cuh"

/* An operand: rows of 128 bytes in shared memory, their 16-byte pieces swizzled with the row's number modulo 8 as
 * tensor copies leave them, 8 rows in 1,024 bytes. k-contiguous: a row is 64 k of one m or n, and the next 16 k begin
 * 32 bytes further on. n-contiguous: a row is 64 n of one k, the next 64 n begin chunk_bytes further on, the next 16 k
 * 16 rows. */
__device__ __forceinline__ uint64_t operand_descriptor(uint32_t address, uint32_t chunk_bytes = 16) {
    constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 >> 4} << 32;
    return kSwizzle128 | kEightRows | static_cast<uint64_t>(chunk_bytes >> 4) << 16 | (address & 0x3ffff) >> 4;
}
/* The same operand `bytes` further on. */
__device__ __forceinline__ uint64_t advance_descriptor(uint64_t descriptor, uint32_t bytes) {
    return descriptor + (bytes >> 4);
}

/* Before the first product that uses registers written otherwise; after the last of a group; and until at most kPending
 * groups are under way. */
__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/* Keeps the compiler from reading sums before the wait that stands before this. */
template <int kCount> __device__ __forceinline__ void wgmma_results(float (&sum)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(sum[i])::"memory");
}

/* sum[64][N] (+)= a[64][16] * b[16][N], a k-contiguous, b n-contiguous if kInOut. Without `add` the sums start anew.
 * Warp w of the four holds rows 16 w to 16 w + 15; lane l of sums 4 j + {0, 1}: row l / 4, columns 8 j + 2 (l % 4) +
 * {0, 1}; of 4 j + {2, 3}: the same of row l / 4 + 8. */
template <typename T, int N, bool kInOut>
__device__ __forceinline__ void wgmma(float (&sum)[N / 2], uint64_t a, uint64_t b, bool add);

/* The same, b k-contiguous, and a in registers: those of an mma_m16n8k16 (mma.cuh) of each warp's 16 rows. */
template <typename T, int N>
__device__ __forceinline__ void wgmma(float (&sum)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add);

/* The same of TF32: a[64][8] in registers, lane l: rows l / 4 and l / 4 + 8 of its warp's 16, column l % 4, then those
 * of column l % 4 + 4; b[8][N]. */
template <int N>
__device__ __forceinline__ void wgmma_tf32(float (&sum)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add);

/* Per N: the names of the N / 2 sums in the instruction, the sums, and the names of the operands after them. */
#define MV_NAMES_4 "%0, %1, %2, %3"
#define MV_NAMES_8 MV_NAMES_4 ", %4, %5, %6, %7"
#define MV_NAMES_16 MV_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define MV_NAMES_20 MV_NAMES_16 ", %16, %17, %18, %19"
#define MV_NAMES_24 MV_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define MV_NAMES_32 MV_NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define MV_NAMES_40 MV_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define MV_NAMES_48 MV_NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define MV_NAMES_56 MV_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define MV_NAMES_64 MV_NAMES_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define MV_NAMES_72 MV_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define MV_NAMES_80 MV_NAMES_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define MV_NAMES_88 MV_NAMES_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define MV_NAMES_96 MV_NAMES_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define MV_NAMES_104 MV_NAMES_96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define MV_NAMES_112 MV_NAMES_104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define MV_NAMES_120 MV_NAMES_112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define MV_NAMES_128 MV_NAMES_120 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define MV_SUMS_FROM_4(i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])
#define MV_SUMS_FROM_8(i) MV_SUMS_FROM_4(i), MV_SUMS_FROM_4(i + 4)
#define MV_SUMS_4 MV_SUMS_FROM_4(0)
#define MV_SUMS_8 MV_SUMS_FROM_8(0)
#define MV_SUMS_16 MV_SUMS_8, MV_SUMS_FROM_8(8)
#define MV_SUMS_20 MV_SUMS_16, MV_SUMS_FROM_4(16)
#define MV_SUMS_24 MV_SUMS_16, MV_SUMS_FROM_8(16)
#define MV_SUMS_32 MV_SUMS_24, MV_SUMS_FROM_8(24)
#define MV_SUMS_40 MV_SUMS_32, MV_SUMS_FROM_8(32)
#define MV_SUMS_48 MV_SUMS_40, MV_SUMS_FROM_8(40)
#define MV_SUMS_56 MV_SUMS_48, MV_SUMS_FROM_8(48)
#define MV_SUMS_64 MV_SUMS_56, MV_SUMS_FROM_8(56)
#define MV_SUMS_72 MV_SUMS_64, MV_SUMS_FROM_8(64)
#define MV_SUMS_80 MV_SUMS_72, MV_SUMS_FROM_8(72)
#define MV_SUMS_88 MV_SUMS_80, MV_SUMS_FROM_8(80)
#define MV_SUMS_96 MV_SUMS_88, MV_SUMS_FROM_8(88)
#define MV_SUMS_104 MV_SUMS_96, MV_SUMS_FROM_8(96)
#define MV_SUMS_112 MV_SUMS_104, MV_SUMS_FROM_8(104)
#define MV_SUMS_120 MV_SUMS_112, MV_SUMS_FROM_8(112)
#define MV_SUMS_128 MV_SUMS_120, MV_SUMS_FROM_8(120)

#define MV_WGMMA(T, type, N, half, A, B, ADD, IN_OUT, E, F, kInOut)                                                    \
    template <>                                                                                                        \
    __device__ __forceinline__ void wgmma<T, N, kInOut>(float(&sum)[half], uint64_t a, uint64_t b, bool add) {         \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n"                                              \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" MV_NAMES_##half              \
                     "}, " A ", " B ", add, 1, 1, 0, " IN_OUT ";\n}"                                                   \
                     : MV_SUMS_##half                                                                                  \
                     : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(kInOut));                                       \
    }
#define MV_WGMMA_OF_REGISTERS(T, type, N, half, A, B, C, D, W, ADD)                                                    \
    template <>                                                                                                        \
    __device__ __forceinline__ void wgmma<T, N>(float(&sum)[half], const uint32_t(&a)[4], uint64_t b, bool add) {      \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n"                                              \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" MV_NAMES_##half              \
                     "}, {" A ", " B ", " C ", " D "}, " W ", add, 1, 1, 0;\n}"                                        \
                     : MV_SUMS_##half                                                                                  \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));                \
    }
#define MV_WGMMA_ALL(...)                                                                                              \
    MV_WGMMA_OF_REGISTERS(__nv_bfloat16, "bf16", __VA_ARGS__)                                                          \
    MV_WGMMA(__nv_bfloat16, "bf16", __VA_ARGS__, false)                                                                \
    MV_WGMMA(__nv_bfloat16, "bf16", __VA_ARGS__, true)                                                                 \
    MV_WGMMA(__half, "f16", __VA_ARGS__, false)                                                                        \
    MV_WGMMA(__half, "f16", __VA_ARGS__, true)

MV_WGMMA_ALL(16, 8, "%8", "%9", "%10", "%11", "%12", "%13")
MV_WGMMA_ALL(32, 16, "%16", "%17", "%18", "%19", "%20", "%21")
MV_WGMMA_ALL(40, 20, "%20", "%21", "%22", "%23", "%24", "%25")
MV_WGMMA_ALL(48, 24, "%24", "%25", "%26", "%27", "%28", "%29")
MV_WGMMA_ALL(64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
MV_WGMMA_ALL(80, 40, "%40", "%41", "%42", "%43", "%44", "%45")
MV_WGMMA_ALL(96, 48, "%48", "%49", "%50", "%51", "%52", "%53")
MV_WGMMA_ALL(112, 56, "%56", "%57", "%58", "%59", "%60", "%61")
MV_WGMMA_ALL(128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
MV_WGMMA_ALL(144, 72, "%72", "%73", "%74", "%75", "%76", "%77")
MV_WGMMA_ALL(160, 80, "%80", "%81", "%82", "%83", "%84", "%85")
MV_WGMMA_ALL(176, 88, "%88", "%89", "%90", "%91", "%92", "%93")
MV_WGMMA_ALL(192, 96, "%96", "%97", "%98", "%99", "%100", "%101")
MV_WGMMA_ALL(208, 104, "%104", "%105", "%106", "%107", "%108", "%109")
MV_WGMMA_ALL(224, 112, "%112", "%113", "%114", "%115", "%116", "%117")
MV_WGMMA_ALL(240, 120, "%120", "%121", "%122", "%123", "%124", "%125")
MV_WGMMA_ALL(256, 128, "%128", "%129", "%130", "%131", "%132", "%133")

#define MV_WGMMA_TF32(N, half, A, B, C, D, W, ADD)                                                                     \
    template <>                                                                                                        \
    __device__ __forceinline__ void wgmma_tf32<N>(float(&sum)[half], const uint32_t(&a)[4], uint64_t b, bool add) {    \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n"                                              \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k8.f32.tf32.tf32 {" MV_NAMES_##half                       \
                     "}, {" A ", " B ", " C ", " D "}, " W ", add, 1, 1;\n}"                                           \
                     : MV_SUMS_##half                                                                                  \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));                \
    }

MV_WGMMA_TF32(8, 4, "%4", "%5", "%6", "%7", "%8", "%9")
MV_WGMMA_TF32(16, 8, "%8", "%9", "%10", "%11", "%12", "%13")
MV_WGMMA_TF32(32, 16, "%16", "%17", "%18", "%19", "%20", "%21")
MV_WGMMA_TF32(64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
MV_WGMMA_TF32(96, 48, "%48", "%49", "%50", "%51", "%52", "%53")
MV_WGMMA_TF32(128, 64, "%64", "%65", "%66", "%67", "%68", "%69")

/* By all warps of a warpgroup: from here on each thread has so many registers. */
template <int kCount> __device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount> __device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

/* The reverse of ldmatrix_x4 (mma.cuh): lane l gives the address of row l % 8 of matrix l / 8. */
__device__ __forceinline__ void stmatrix_x4(uint32_t row, const uint32_t (&m)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(m[0]), "r"(m[1]),
                 "r"(m[2]), "r"(m[3])
                 : "memory");
}

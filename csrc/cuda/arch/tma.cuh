/* tma.cuh: the tensor copies of Hopper, one instruction per function, and what CTAs of a cluster say to each other. A
 * tensor map (tensor_map.cuh) describes a matrix and a box of it; a copy names the box by its first column and row. */
#pragma once

#include <cuda.h>

#include "cuda/arch/mbarrier.cuh"

/* Brings a box to shared memory and reports its bytes to the barrier. What lies outside the matrix comes as zeros. */
__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap *map, int column, int row, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
                 "[%4];" ::"r"(to),
                 "l"(map), "r"(column), "r"(row), "r"(barrier)
                 : "memory");
}

/* Has L2 bring a box: nothing is returned, so nothing that is still being written can be read too early. */
__device__ __forceinline__ void prefetch_box(const CUtensorMap *map, int column, int row) {
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(map), "r"(column), "r"(row));
}

/* The same to every CTA of the cluster whose bit is set, at the same places of its shared memory. */
__device__ __forceinline__ void load_box_multicast(uint32_t to, const CUtensorMap *map, int column, int row,
                                                   uint32_t barrier, uint16_t ctas) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
                 "[%1, {%2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(ctas)
                 : "memory");
}

/* Writes a box; what lies outside the matrix is left out. Copies of a thread are closed into groups, and awaited. */
__device__ __forceinline__ void store_box(const CUtensorMap *map, int column, int row, uint32_t from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column),
                 "r"(row), "r"(from)
                 : "memory");
}
__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

/* Waits until all stores of this thread have read their shared memory. */
__device__ __forceinline__ void store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

/* Makes this thread's ordinary accesses to shared, or global, memory visible to the copies that come after them. */
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

/* A barrier of some of the block's warps, by a number known at run time. */
__device__ __forceinline__ void warps_barrier(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

/* Lets those through that wait at it, and goes on. */
__device__ __forceinline__ void warps_arrive(int number, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

/* ---- clusters -------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/* All threads of the cluster that have not exited meet here; what they wrote before is seen after. */
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/* The same in two halves: what lies between them runs while others have yet to arrive. Of what was written before,
 * only initialised barriers are seen after, and those by their fence. */
__device__ __forceinline__ void cluster_barrier_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_barrier_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/* The place in another CTA's shared memory that corresponds to this one's. */
__device__ __forceinline__ uint32_t cluster_address(uint32_t address, uint32_t rank) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}
/* Writes to another CTA's shared memory, which sees it once its barrier, which is told of the bytes, has completed. */
__device__ __forceinline__ void send_to_cluster(uint32_t there, const float (&v)[4], uint32_t barrier) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(there),
        "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier)
        : "memory");
}
__device__ __forceinline__ void send_to_cluster(uint32_t there, float a, float b, uint32_t barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(there),
                 "f"(a), "f"(b), "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void cluster_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

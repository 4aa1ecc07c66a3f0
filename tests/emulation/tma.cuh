/* tma.cuh: the tensor copies of csrc/cuda/arch/tma.cuh in C++, and what blocks of a cluster say to each other. */
#pragma once

#include "cuda/arch/driver.cuh"
#include "cuda/arch/mbarrier.cuh"

namespace cpu {

/* Calls copy(in shared memory, in global memory or NULL outside of the matrix, bytes) for each value of a box. */
template <typename Copy> void walk_box(const CUtensorMap *of, int column, int row, uint32_t shared_at, Copy copy) {
    TensorMap map;
    memcpy(&map, of, sizeof map);
    for (int r = 0; r < map.box_rows; r++)
        for (int c = 0; c < map.box_columns; c++) {
            const uint32_t at = shared_at + static_cast<uint32_t>((r * map.box_columns + c) * map.value_bytes);
            const bool inside = row + r >= 0 && row + r < map.rows && column + c >= 0 && column + c < map.columns;
            copy(swizzle(at, map.swizzled_bytes),
                 inside ? map.data + (row + r) * map.row_bytes + int64_t{column + c} * map.value_bytes : nullptr,
                 map.value_bytes);
        }
}

inline void load_box_to(uint32_t to, const CUtensorMap *map, int column, int row, uint32_t barrier, unsigned rank) {
    int bytes = 0;
    walk_box(map, column, row, to, [&](uint32_t at, const char *from, int value_bytes) {
        if (from)
            memcpy(shared_of(at, rank), from, value_bytes);
        else
            memset(shared_of(at, rank), 0, value_bytes);
        bytes += value_bytes;
    });
    mbarrier(barrier, rank).learn();
    mbarrier(barrier, rank).bytes -= bytes;
    mbarrier(barrier, rank).step();
}

} // namespace cpu

inline void load_box(uint32_t to, const CUtensorMap *map, int column, int row, uint32_t barrier) {
    cpu::load_box_to(to, map, column, row, barrier, cpu::current->rank);
}
inline void load_box_multicast(uint32_t to, const CUtensorMap *map, int column, int row, uint32_t barrier,
                               uint16_t ctas) {
    for (unsigned rank = 0; rank < cpu::cluster.size(); rank++)
        if (ctas >> rank & 1) cpu::load_box_to(to, map, column, row, barrier, rank);
}
inline void store_box(const CUtensorMap *map, int column, int row, uint32_t from) {
    cpu::walk_box(map, column, row, from, [](uint32_t at, char *to, int value_bytes) {
        if (to) memcpy(to, cpu::shared() + at, value_bytes);
    });
}
inline void prefetch_box(const CUtensorMap *, int, int) {}
inline void store_commit() {}
inline void store_wait_read() {}
inline void fence_async_shared() {}
inline void fence_async_global() {}

inline void warps_barrier(int number, int threads) {
    cpu::Meeting &meeting = cpu::own_block().named[number];
    meeting.expected = static_cast<unsigned>(threads);
    meeting.arrive_and_wait();
}

inline void warps_arrive(int number, int threads) {
    cpu::Meeting &meeting = cpu::own_block().named[number];
    meeting.expected = static_cast<unsigned>(threads);
    meeting.arrive();
}

inline uint32_t cluster_rank() { return cpu::current->rank; }
inline void cluster_barrier() { cpu::cluster_meets.arrive_and_wait(); }
inline void cluster_barrier_arrive() {} /* both halves in one: no thread may go on before that */
inline void cluster_barrier_wait() { cluster_barrier(); }
inline uint32_t cluster_address(uint32_t address, uint32_t rank) { return address | rank << 24; }
inline void cluster_arrive(uint32_t barrier) { cpu::mbarrier(barrier, barrier >> 24).arrive(); }
template <int kBytes> void send_bytes(uint32_t there, const float (&v)[kBytes / 4], uint32_t barrier) {
    if (there % kBytes != 0) abort();
    memcpy(cpu::shared_of(there, there >> 24), v, kBytes);
    cpu::Mbarrier &at = cpu::mbarrier(barrier, barrier >> 24);
    at.learn();
    at.bytes -= kBytes;
    at.step();
}
inline void send_to_cluster(uint32_t there, const float (&v)[4], uint32_t barrier) {
    send_bytes<16>(there, v, barrier);
}
inline void send_to_cluster(uint32_t there, float a, float b, uint32_t barrier) {
    send_bytes<8>(there, {a, b}, barrier);
}

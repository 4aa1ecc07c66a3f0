/* mbarrier.cuh: the barriers of csrc/cuda/arch/mbarrier.cuh in C++. */
#pragma once

namespace cpu {

struct Mbarrier {
    uint32_t expected : 15, pending : 15, phase : 1,
        waited : 1; /* waited: who arrived had waited for the kernel in front */
    int32_t bytes;  /* announced and not there */
    void arrive() {
        learn();
        pending--;
        step();
    }
    void learn() { waited |= current->has_waited(); }
    void step() {
        if (pending != 0 || bytes != 0) return;
        phase ^= 1;
        pending = expected;
    }
};
static_assert(sizeof(Mbarrier) == 8);

/* The number of a block is in the high bits of an address in another's shared memory. */
inline char *shared_of(uint32_t address, unsigned rank) { return cluster[rank]->shared + (address & 0xffffff); }
inline Mbarrier &mbarrier(uint32_t address, unsigned rank = current->rank) {
    return *reinterpret_cast<Mbarrier *>(shared_of(address, rank));
}

} // namespace cpu

inline void mbarrier_init(uint32_t barrier, int arrivals) {
    const unsigned count = static_cast<unsigned>(arrivals);
    cpu::mbarrier(barrier) = {count, count, 0, 0, 0};
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint32_t barrier) { cpu::mbarrier(barrier).arrive(); }
inline void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
    cpu::mbarrier(barrier).bytes += static_cast<int32_t>(bytes);
    mbarrier_arrive(barrier);
}
inline void cp_async_arrive(uint32_t barrier) { mbarrier_arrive(barrier); }
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    while (cpu::mbarrier(barrier).phase == parity) cpu::yield();
    if (cpu::mbarrier(barrier).waited) cpu::wait_for_kernel_in_front();
}

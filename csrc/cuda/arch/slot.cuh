/* slot.cuh: where a thread is in a ring of stages in shared memory, whose barriers (mbarrier.cuh) have a phase a
 * round. */
#pragma once

#include <cstdint>

/* A stage, and the parity of the round. */
struct Slot {
    int index = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void advance(int stages, int by = 1) {
        index += by;
        if (index < stages) return;
        index -= stages;
        parity ^= 1;
    }
    /* Over any number of steps. */
    __device__ __forceinline__ void skip(int stages, int steps) {
        parity ^= steps / stages & 1;
        advance(stages, steps % stages);
    }
    __device__ __forceinline__ void retreat(int stages, int by) {
        index -= by;
        if (index >= 0) return;
        index += stages;
        parity ^= 1;
    }
};

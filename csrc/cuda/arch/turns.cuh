/* turns.cuh: two warpgroups that multiply, and take turns: of steps, or of tiles. So neither waits for more than a
 * round of the ring, and a round's parity says which one it is. */
#pragma once

#include "cuda/arch/tma.cuh"

namespace {

constexpr int kConsumers = 256; /* threads of both */
constexpr int kTurnBarrier = 4; /* and 5 */

/* half: which of the two calls. */
__device__ __forceinline__ void await_turn(int half) { warps_barrier(kTurnBarrier + half, kConsumers); }
__device__ __forceinline__ void give_turn(int half) { warps_arrive(kTurnBarrier + 1 - half, kConsumers); }

} // namespace

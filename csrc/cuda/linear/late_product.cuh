/* late_product.cuh: a tile of the projection whose x is not normalised yet. The norm weights join on the way of x from
 * shared memory to the registers of the tensor cores' operand, its squares are gathered there, and the row factor joins
 * the sums: one launch, x is read once, and there is no y. rounding="fp32" allows that; y = rn(x w) is rounded once. */
#pragma once

#include "cuda/arch/mma.cuh"
#include "cuda/arch/reduce.cuh"
#include "cuda/linear/wgmma_product.cuh"
#include "cuda/norm/rms_norm.cuh"

namespace {

/* A step of 64 k of a warp's 16 tokens, in the registers of four products: x on its way to x times the norm weights. */
struct TokenStep {
    uint32_t x[kStep / 16][4], weights[2][4];

    __device__ __forceinline__ void load(uint32_t tokens_at, uint32_t weights_at) {
        const uint32_t lane = threadIdx.x % 32;
#pragma unroll
        for (uint32_t i = 0; i < 2; i++) ldmatrix_x4(weights[i], weights_at ^ (lane / 8 * 16 + i * 64));
#pragma unroll
        for (uint32_t k = 0; k < kStep / 16; k++) ldmatrix_x4(x[k], tokens_at ^ k * 32);
    }

    /* What product k takes. The squares of x join those of this lane's two rows. */
    template <typename T> __device__ __forceinline__ void scale(int k, float (&squares)[2][2]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const Packet<T> pair = {{x[k][i]}};
#pragma unroll
            for (int odd = 0; odd < 2; odd++)
                squares[i % 2][odd] = fmaf(pair.get(odd), pair.get(odd), squares[i % 2][odd]);
            x[k][i] = multiply_pair<T>(x[k][i], weights[k / 2][k % 2 * 2 + i / 2]);
        }
    }
};

/* A step is taken while the tensor cores have the other warpgroup's: without turns both would take theirs at the same
 * time, and the tensor cores wait. */
template <typename T, typename Tile> __device__ __forceinline__ void
multiply_late(float (&sum)[Tile::N / 2], const WgmmaRing<Tile> &ring, Slot &slot, const WgmmaProduct &p) {
    const uint32_t lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32), row = warp * 16 + lane % 16;
    const uint32_t in_stage = row * kRowBytes + (lane / 16 ^ row % 8) * 16;
    const int half = static_cast<int>(warp / 4);
    float squares[2][2] = {};
    const auto take = [&](TokenStep &step) {
        mbarrier_wait(ring.full + 8 * slot.index, slot.parity);
        step.load(ring.at + slot.index * ring.stage_bytes + in_stage,
                  ring.norm_weights + slot.index * kRowBytes + slot.index % 8 * 16);
#pragma unroll
        for (int k = 0; k < kStep / 16; k++) step.scale<T>(k, squares);
    };
    int previous = 0; /* its slot is not released yet */
    const auto multiply_step = [&](const TokenStep &step, bool add) {
        const uint64_t w = operand_descriptor(ring.at + slot.index * ring.stage_bytes + ring.x_bytes);
        await_turn(half);
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < kStep / 16; k++)
            wgmma<T, Tile::N>(sum, step.x[k], advance_descriptor(w, k * 32), add || k > 0);
        wgmma_commit();
        give_turn(half);
        wgmma_wait<1>();
        if (add) release(ring.empty, previous, 1);
        previous = slot.index;
        slot.advance(ring.stages);
    };
    TokenStep even, odd;
    take(even);
#pragma unroll 1
    for (int step = 0;; step += 2) {
        multiply_step(even, step > 0);
        if (step + 1 == p.steps) break;
        take(odd);
        multiply_step(odd, true);
        if (step + 2 == p.steps) break;
        take(even);
    }
    wgmma_wait<0>();
    release(ring.empty, previous, 1);
    wgmma_results(sum);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float r = row_factor<T>(warp_sum<4>(squares[i][0] + squares[i][1]), p.norm);
#pragma unroll
        for (int j = 0; j < Tile::N / 2; j += 4) sum[j + 2 * i] *= r, sum[j + 2 * i + 1] *= r;
    }
}

} // namespace

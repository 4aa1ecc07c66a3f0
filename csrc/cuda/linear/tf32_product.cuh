/* tf32_product.cuh: tiles of a float32 projection on Hopper's tensor cores, as the warps of a CTA see them: its works,
 * the ring and the thread that fills it, and the two loops that multiply (3xtf32_sm90a.cu says why). */
#pragma once

#include "cuda/arch/ptx.cuh"
#include "cuda/arch/slot.cuh"
#include "cuda/arch/tensor_map.cuh"
#include "cuda/arch/tma.cuh"
#include "cuda/arch/turns.cuh"
#include "cuda/arch/wgmma.cuh"
#include "cuda/linear/tf32_tiles.cuh"
#include "cuda/linear/token_tile.cuh"

namespace {

constexpr int kRowBytes = 4 * kTf32Step;
/* The ring leaves shared memory to the blocks of the next call's norm. */
constexpr int kRingBytes = 220 << 10, kMaxStages = 12, kBarrierBytes = 16 * kMaxStages + 16;

/* kOnce: of products of the high parts alone, whose error is that of TF32. */
template <int kTokens, bool kOnce> struct Tf32Tile {
    static constexpr int tokens = kTokens;
    static constexpr bool once = kOnce;
    static constexpr int outputs = tile_outputs(once), blocks = outputs / 128; /* of 64 outputs, of a warpgroup */
    static constexpr int plane_bytes = tokens * kRowBytes, weight_bytes = outputs * kRowBytes;
    static constexpr int stage_bytes = weight_bytes + (once ? 1 : 2) * plane_bytes;
    static constexpr int fit = kRingBytes / stage_bytes, stages = fit < kMaxStages ? fit : kMaxStages;
    static constexpr int ring_bytes = stages * stage_bytes;
    static constexpr int block_sums = tokens / 2, sums = blocks * block_sums; /* of a thread */
    static constexpr int part_floats = kConsumers * sums;
    static constexpr bool trades_registers = blocks * tokens > 96; /* with a third warpgroup */
    static constexpr int threads = kConsumers + (trades_registers ? 128 : 32);
    static_assert(stages >= 3);

    /* Where a thread's outputs of a block begin in the tile; others follow 8 rows behind. */
    static __device__ __forceinline__ int first_row(int block) {
        const int warp = threadIdx.x / 32;
        return (warp / 4 * blocks + block) * 64 + warp % 4 * 16 + static_cast<int>(threadIdx.x % 32) / 4;
    }
};

template <typename T> using Tf32Sums = float[T::sums];

/* Those of a block. */
template <typename T> __device__ __forceinline__ auto block_of(Tf32Sums<T> &sums, int block)
    -> float (&)[T::block_sums] {
    return reinterpret_cast<float(&)[T::block_sums]>(sums[block * T::block_sums]);
}

struct Tf32Product {
    CUtensorMap y, weight[3]; /* y: the plane of high parts, then the one of low parts, where there is one */
    mv_task task;
    int64_t low_plane;             /* elements from a high part to its low one, or 0 */
    int low_row;                   /* rows */
    int steps;                     /* along hidden */
    unsigned rows, columns, group; /* of tiles; rows that walk over all columns together */
    unsigned whole_tiles;          /* of them, in waves */
    unsigned split_tiles, sharers; /* the others, and the CTAs that share their steps */
    float *parts;                  /* sums: two of each of these CTAs */
    uint32_t *counters;            /* of each split tile: steps that are done */
};

/* Some steps of a tile. */
struct Work {
    unsigned tile, from, to;
};

/* The split tiles' steps, counted through: the first of a CTA, and the CTA that has one. */
__device__ __forceinline__ unsigned first_step(const Tf32Product &p, unsigned cta) {
    return p.split_tiles * p.steps * cta / p.sharers;
}
__device__ __forceinline__ unsigned cta_of(const Tf32Product &p, unsigned step) {
    return ((step + 1) * p.sharers - 1) / (p.split_tiles * p.steps);
}

/* What a CTA does: a tile of each wave, then its share of the others. */
struct Works {
    const Tf32Product &p;
    unsigned tile, at, end;

    __device__ __forceinline__ explicit Works(const Tf32Product &p) : p(p), tile(blockIdx.x), at(0), end(0) {
        if (blockIdx.x >= p.sharers) return;
        at = first_step(p, blockIdx.x);
        end = first_step(p, blockIdx.x + 1);
    }

    __device__ __forceinline__ bool next(Work &work) {
        const unsigned steps = static_cast<unsigned>(p.steps);
        if (tile < p.whole_tiles) {
            work = {tile, 0, steps};
            tile += gridDim.x;
            return true;
        }
        if (at >= end) return false;
        const unsigned from = at % steps;
        work = {p.whole_tiles + at / steps, from, min(from + (end - at), steps)};
        at += work.to - from;
        return true;
    }
};

/* Where a tile lies: its first token, and its first output: of one block of the task, and of all. */
struct Tf32Place {
    int64_t token;
    int block;
    int64_t row, output;
};

__device__ __forceinline__ int64_t outputs_of(const mv_task &task, int block) {
    return task.linear.packed ? task.linear.outputs : task.linear.block[block].outputs;
}

template <typename T> __device__ __forceinline__ Tf32Place find_tf32_place(const Tf32Product &p, unsigned tile) {
    const TileIndex index = index_tile<true>(tile, p.rows, p.columns, p.group);
    Tf32Place place = {int64_t{index.row} * T::tokens, 0, int64_t{index.column} * T::outputs, 0};
    for (;; place.block++) {
        const int64_t outputs = outputs_of(p.task, place.block), tiles = (outputs + T::outputs - 1) / T::outputs;
        if (place.row < tiles * T::outputs) break;
        place.row -= tiles * T::outputs;
        place.output += outputs;
    }
    place.output += place.row;
    return place;
}

/* The ring, and the barriers of its stages: all copies have come, all have been read. */
template <typename T> struct Tf32Ring {
    static constexpr int kBytes = T::ring_bytes, kStages = T::stages;
    uint32_t at, full, empty;
    __device__ __forceinline__ explicit Tf32Ring(uint32_t shared)
        : at(shared), full(shared + kBytes), empty(full + 8 * kStages) {}
    __device__ __forceinline__ uint32_t stage(int slot) const { return at + slot * T::stage_bytes; }
    __device__ __forceinline__ uint32_t y(int slot) const { return stage(slot) + T::weight_bytes; }

    /* By one thread of each warp. */
    __device__ __forceinline__ void init_barriers(int warp) const {
#pragma unroll 1
        for (int slot = warp; slot < kStages; slot += T::threads / 32) {
            mbarrier_init(full + 8 * slot, 1);
            mbarrier_init(empty + 8 * slot, kConsumers / 32);
        }
        mbarrier_init_fence();
    }
};

/* By one thread: brings all steps of the CTA's works. The first weights come, or L2 is asked for them, before
 * the wait for y. */
template <typename T> __device__ __forceinline__ void produce(const Tf32Product &p, const Tf32Ring<T> &ring) {
    const auto load_weights = [&](const Tf32Place &place, int slot, unsigned step) {
        mbarrier_arrive_expect(ring.full + 8 * slot, T::stage_bytes);
        load_box(ring.stage(slot), &p.weight[place.block], static_cast<int>(step) * kTf32Step,
                 static_cast<int>(place.row), ring.full + 8 * slot);
    };
    const auto load_y = [&](const Tf32Place &place, int slot, unsigned step) {
        const int column = static_cast<int>(step) * kTf32Step, row = static_cast<int>(place.token);
        const uint32_t to = ring.y(slot), barrier = ring.full + 8 * slot;
        load_box(to, &p.y, column, row, barrier);
        if constexpr (!T::once) load_box(to + T::plane_bytes, &p.y, column, row + p.low_row, barrier);
    };
    Slot slot;
    Works works(p);
    bool first = true;
    for (Work work; works.next(work);) {
        const Tf32Place place = find_tf32_place<T>(p, work.tile);
        if (first) {
            const unsigned ahead = min(work.to - work.from, static_cast<unsigned>(T::stages));
            for (unsigned i = 0; i < ahead; i++) {
                if (p.task.static_weights)
                    load_weights(place, static_cast<int>(i), work.from + i);
                else
                    prefetch_box(&p.weight[place.block], static_cast<int>(work.from + i) * kTf32Step,
                                 static_cast<int>(place.row));
            }
            griddepcontrol_wait();
            griddepcontrol_launch();
            fence_async_global();
            const unsigned loaded = p.task.static_weights ? ahead : 0;
            for (unsigned i = 0; i < loaded; i++, slot.advance(T::stages)) load_y(place, slot.index, work.from + i);
            work.from += loaded;
            first = false;
        }
        for (; work.from < work.to; work.from++, slot.advance(T::stages)) {
            mbarrier_wait(ring.empty + 8 * slot.index, slot.parity ^ 1);
            load_weights(place, slot.index, work.from);
            load_y(place, slot.index, work.from);
        }
    }
}

/* A lane's weights of a step, and the operands of the products that come of them: rows l / 4 and l / 4 + 8 of its warp,
 * columns l % 4 and l % 4 + 4 of each 8 k. */
struct WeightStep {
    float value[kTf32Step / 8][4];
    uint32_t high[kTf32Step / 8][4], low[kTf32Step / 8][4];

    /* own: this lane's upper row in the stage. */
    __device__ __forceinline__ void load(const char *own) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int k = 0; k < kTf32Step / 8; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) /* 16-byte pieces are swizzled with the row */
                value[k][i] = *reinterpret_cast<const float *>(own + i % 2 * 8 * kRowBytes +
                                                               ((2 * k + i / 2) ^ lane / 4) * 16 + lane % 4 * 4);
    }
    __device__ __forceinline__ void split() {
#pragma unroll
        for (int k = 0; k < kTf32Step / 8; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                high[k][i] = round_tf32(value[k][i]);
                low[k][i] = round_tf32(value[k][i] - __uint_as_float(high[k][i]));
            }
    }
};

/* Adds so many steps to the totals of the warpgroup. */
template <typename T> __device__ __forceinline__ void
multiply_tf32(Tf32Sums<T> &total, const char *smem, const Tf32Ring<T> &ring, Slot &slot, unsigned steps) {
    static_assert(!T::once && T::blocks == 1);
    const int half = static_cast<int>(uniform(threadIdx.x / 128)), lane = threadIdx.x % 32;
    const char *const own = smem + T::first_row(0) * kRowBytes;
    WeightStep w;
    const auto load = [&] {
        mbarrier_wait(ring.full + 8 * slot.index, slot.parity);
        w.load(own + slot.index * T::stage_bytes);
    };
    load();
#pragma unroll 1
    for (bool more = true; more;) {
        w.split();
        const int used = slot.index;
        const uint64_t high = operand_descriptor(ring.y(used));
        const uint64_t low = advance_descriptor(high, T::plane_bytes);
        Tf32Sums<T> sum;
        await_turn(half);
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < kTf32Step / 8; k++) {
            wgmma_tf32<T::tokens>(sum, w.low[k], advance_descriptor(high, k * 32), k > 0);
            wgmma_tf32<T::tokens>(sum, w.high[k], advance_descriptor(low, k * 32), true);
        }
#pragma unroll
        for (int k = 0; k < kTf32Step / 8; k++)
            wgmma_tf32<T::tokens>(sum, w.high[k], advance_descriptor(high, k * 32), true);
        wgmma_commit();
        give_turn(half);
        slot.advance(T::stages);
        more = --steps > 0;
        if (more) load(); /* meanwhile */
        wgmma_wait<0>();
        if (lane == 0) mbarrier_arrive(ring.empty + 8 * used);
        wgmma_results(sum);
#pragma unroll
        for (int i = 0; i < T::sums; i++) total[i] += sum[i];
    }
}

/* The same of the high parts alone. A step's weights come from shared memory while the step before is multiplied. */
template <typename T> __device__ __forceinline__ void
multiply_once(Tf32Sums<T> &total, const char *smem, const Tf32Ring<T> &ring, Slot &slot, unsigned steps) {
    const int lane = threadIdx.x % 32;
    const char *const own = smem + T::first_row(0) * kRowBytes;
    const auto take = [&](WeightStep(&w)[T::blocks]) {
        mbarrier_wait(ring.full + 8 * slot.index, slot.parity);
#pragma unroll
        for (int b = 0; b < T::blocks; b++) {
            w[b].load(own + slot.index * T::stage_bytes + b * 64 * kRowBytes);
            w[b].split();
        }
    };
    int previous = 0; /* its slot is not released yet */
    const auto release = [&] {
        if (lane == 0) mbarrier_arrive(ring.empty + 8 * previous);
    };
    const auto multiply_step = [&](const WeightStep(&w)[T::blocks], bool first) {
        const uint64_t y = operand_descriptor(ring.y(slot.index));
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < kTf32Step / 8; k++)
#pragma unroll
            for (int b = 0; b < T::blocks; b++)
                wgmma_tf32<T::tokens>(block_of<T>(total, b), w[b].high[k], advance_descriptor(y, k * 32), true);
        wgmma_commit();
        wgmma_wait<1>();
        if (!first) release();
        previous = slot.index;
        slot.advance(T::stages);
    };
    WeightStep even[T::blocks], odd[T::blocks];
    take(even);
#pragma unroll 1
    for (unsigned step = 0;; step += 2) {
        multiply_step(even, step == 0);
        if (step + 1 == steps) break;
        take(odd);
        multiply_step(odd, false);
        if (step + 2 == steps) break;
        take(even);
    }
    wgmma_wait<0>();
    release();
    wgmma_results(total);
}

} // namespace

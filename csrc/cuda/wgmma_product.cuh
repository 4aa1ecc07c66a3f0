/* wgmma_product.cuh: tiles of a projection on Hopper's tensor cores, as the warps of a CTA see them.
 *
 * A CTA owns a tile of 128 (or 64) tokens x N outputs and walks over hidden in steps of 64. One thread brings the steps
 * to a ring in shared memory by tensor copies; two warpgroups multiply half of the tile each. The ring runs on over the
 * CTA's tiles, so the copies of a tile begin while the one before it is still being stored, and one warpgroup stores
 * while the other multiplies.
 *
 * Two CTAs of a cluster have different tokens and the same outputs: each brings half of the weights and sends it to
 * both.
 *
 * An output's bits do not depend on the number of tokens: the tensor cores add the same groups of 16 k in the same
 * order for every tile. */
#pragma once

#include "norm_rows.cuh"
#include "ptx.cuh"
#include "qkv_epilogue.cuh"
#include "tensor_map.cuh"
#include "tma.cuh"
#include "wgmma.cuh"
#include "wgmma_tiles.cuh"

namespace {

constexpr int kRowBytes = 2 * kStep;
constexpr int kWarpgroups = 2, kConsumers = 128 * kWarpgroups;
constexpr size_t kSmemBytes = 232448; /* of a Hopper CTA */

/* M tokens x N outputs, and what shared memory holds: the ring, then boxes of outputs on their way out (a part of each
 * warpgroup's), biases, barriers. Of 128 tokens each warpgroup has a half; 64 tokens both have, with half of the
 * outputs. */
template <int kTokens, int kOutputs, bool kInOut> struct Tile {
    static constexpr int M = kTokens, N = kOutputs;
    static constexpr bool split_tokens = M == 128, in_out = kInOut;
    static constexpr bool spare_warps = N >= kSpareOutputs;
    static constexpr int own_outputs = split_tokens ? N : N / 2; /* of a warpgroup */
    static constexpr int x_bytes = M * kRowBytes;
    static constexpr int chunks = (N + kStep - 1) / kStep, chunk_bytes = kStep * kRowBytes; /* of an in_out weight */
    static constexpr int w_bytes = kInOut ? chunks * chunk_bytes : N * kRowBytes;
    static constexpr int stage_bytes = x_bytes + w_bytes;
    static constexpr int box_columns = own_outputs % 32 == 0 ? 32 : own_outputs % 16 == 0 ? 16 : 8; /* 64 tokens high */
    static constexpr int box_pieces = box_columns / 8, box_bytes = 64 * box_columns * 2;
    static constexpr int boxes = own_outputs / box_columns;
    static constexpr int boxes_at_once = own_outputs <= 160 ? boxes : (boxes + 1) / 2;
    static constexpr int out_bytes = kWarpgroups * boxes_at_once * box_bytes;
    static constexpr int bias_bytes = kWarpgroups * own_outputs * 4;
    static constexpr int stages = (kSmemBytes - out_bytes - bias_bytes - 256) / stage_bytes;
    static constexpr int ring_bytes = stages * stage_bytes;
    static constexpr int barriers_at = ring_bytes + out_bytes + bias_bytes;
    static constexpr size_t smem_bytes = barriers_at + 16 * stages;
    static_assert(smem_bytes <= kSmemBytes && stages >= 3);
    static_assert(split_tokens || (M == 64 && !in_out));
};

/* Consecutive outputs that one matrix of weights makes. */
struct Segment {
    CUtensorMap weight, out;
    const void *bias;
    mv_dtype bias_dtype;
    int outputs;
    unsigned tiles;
    int64_t first_output;
};

struct Product {
    CUtensorMap x;
    Segment segment[3];
    mv_rows out;
    int64_t inner, tokens;
    int steps;              /* along hidden */
    int stage_bytes;        /* that copies bring for a step */
    unsigned rows, columns; /* of tiles: a row is as high as the cluster has CTAs */
    unsigned group;         /* rows that walk over all columns together */
    unsigned cluster;
    bool out_boxes; /* outputs leave by tensor copies */
    bool dynamic_weights;
    mv_task norm; /* what makes the rows from counters.first_row on */
    RowCounters counters;
};

/* The tile of a CTA. The last one of a row begins early enough to be whole, where there are that many outputs: copies
 * that reach past the end of a matrix are slow, and what two tiles both have is the same. */
struct Place {
    int token, segment, output;
};

template <typename Tile> __device__ __forceinline__ Place find_place(const Product &p, unsigned item, unsigned rank) {
    const TileIndex index = index_tile(item, p.rows, p.columns, p.group);
    unsigned tile = index.column;
    int segment = 0;
    while (tile >= p.segment[segment].tiles) tile -= p.segment[segment++].tiles;
    return {static_cast<int>((index.row * p.cluster + rank) * Tile::M), segment,
            max(0, min(static_cast<int>(tile * Tile::N), p.segment[segment].outputs - Tile::N))};
}

/* A place in the ring, and the parity of the round. */
struct Slot {
    int index = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void advance(int stages) {
        if (++index == stages) {
            index = 0;
            parity ^= 1;
        }
    }
};

/* ---- the producer ---------------------------------------------------------------------------------------------- */

/* Brings what a tile needs, step by step, to the ring. kShared: the weights come in halves, one from each CTA. */
template <typename Tile, bool kShared> struct Producer {
    const Product &p;
    uint32_t ring, full, empty;
    unsigned rank;

    __device__ __forceinline__ void load_x(const Place &place, int slot, int step) const {
        load_box(ring + slot * Tile::stage_bytes, &p.x, step * kStep, place.token, full + 8 * slot);
    }

    __device__ __forceinline__ void load_w(const CUtensorMap *map, const Place &place, int slot, int step) const {
        const uint32_t to = ring + slot * Tile::stage_bytes + Tile::x_bytes, barrier = full + 8 * slot;
        if constexpr (Tile::in_out) {
#pragma unroll
            for (int c = 0; c < Tile::chunks; c++)
                load_part<kStep>(to + c * Tile::chunk_bytes, map, place.output + c * kStep, step * kStep, barrier);
        } else {
            load_part<Tile::N>(to, map, step * kStep, place.output, barrier);
        }
    }

    template <int kRows> __device__ __forceinline__ void load_part(uint32_t to, const CUtensorMap *map, int column,
                                                                   int row, uint32_t barrier) const {
        constexpr int kPart = kRows / kCluster;
        if constexpr (kShared)
            load_box_multicast(to + rank * kPart * kRowBytes, map, column, row + rank * kPart, barrier, 3);
        else
            load_box(to, map, column, row, barrier);
    }

    /* The rows of a tile are there; ordinary stores have written them, and copies read them. */
    __device__ __forceinline__ void await(const Place &place) const {
        await_rows(p.counters, place.token / kBlockRows * kBlockRows, static_cast<int>(p.tokens));
        fence_async_global();
    }

    __device__ __forceinline__ void run(unsigned item, unsigned items, unsigned apart) const {
        const int ahead = min(Tile::stages, p.steps);
        Place place = find_place<Tile>(p, item, rank);
        const CUtensorMap *weight = &p.segment[place.segment].weight;
        if (p.dynamic_weights) griddepcontrol_wait();
#pragma unroll 1
        for (int slot = 0; slot < ahead; slot++) {
            mbarrier_arrive_expect(full + 8 * slot, p.stage_bytes);
            load_w(weight, place, slot, slot);
        }
        griddepcontrol_wait();
        griddepcontrol_launch();
        await(place);
        Slot slot;
        int step = 0;
#pragma unroll 1
        for (; step < ahead; step++, slot.advance(Tile::stages)) load_x(place, slot.index, step);
        for (;;) {
#pragma unroll 1
            for (; step < p.steps; step++, slot.advance(Tile::stages)) {
                mbarrier_wait(empty + 8 * slot.index, slot.parity ^ 1);
                mbarrier_arrive_expect(full + 8 * slot.index, p.stage_bytes);
                load_x(place, slot.index, step);
                load_w(weight, place, slot.index, step);
            }
            item += apart;
            if (item >= items) break;
            place = find_place<Tile>(p, item, rank);
            weight = &p.segment[place.segment].weight;
            step = 0;
            await(place);
        }
    }
};

/* ---- the consumers --------------------------------------------------------------------------------------------- */

/* This warp has read a slot: each CTA that sends to it may overwrite it. */
__device__ __forceinline__ void release(uint32_t empty, int slot, unsigned ctas) {
    const unsigned lane = threadIdx.x % 32;
    if (ctas == 1) {
        if (lane == 0) mbarrier_arrive(empty + 8 * slot);
    } else if (lane < ctas) {
        cluster_arrive(cluster_address(empty + 8 * slot, lane));
    }
}

/* A warpgroup's sums of a tile. */
template <typename T, typename Tile>
__device__ __forceinline__ void multiply(float (&sum)[Tile::own_outputs / 2], uint32_t smem, uint32_t full,
                                         uint32_t empty, Slot &slot, int steps, unsigned ctas) {
    constexpr bool kInOut = Tile::in_out;
    const uint32_t half = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0); /* a uniform register, this way */
    const uint32_t own_x = Tile::split_tokens ? half * (Tile::x_bytes / 2) : 0;
    const uint32_t own_w = Tile::split_tokens ? 0 : half * (Tile::w_bytes / 2);
    int previous = 0;
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        mbarrier_wait(full + 8 * slot.index, slot.parity);
        const uint32_t x_at = smem + slot.index * Tile::stage_bytes, w_at = x_at + Tile::x_bytes + own_w;
        const uint64_t x = operand_descriptor(x_at + own_x);
        const uint64_t w = kInOut ? operand_descriptor(w_at, Tile::chunk_bytes) : operand_descriptor(w_at);
        wgmma_begin();
#pragma unroll
        for (int part = 0; part < kStep / 16; part++)
            wgmma<T, Tile::own_outputs, kInOut>(sum, advance_descriptor(x, part * 32),
                                                advance_descriptor(w, part * (kInOut ? 16 * kRowBytes : 32)),
                                                step > 0 || part > 0);
        wgmma_commit();
        if (step > 0) {
            wgmma_wait<1>();
            release(empty, previous, ctas);
        }
        previous = slot.index;
        slot.advance(Tile::stages);
    }
    wgmma_wait<0>();
    release(empty, previous, ctas);
    wgmma_results(sum);
}

/* Where a piece of eight outputs of a row lies among the boxes: swizzled as tensor copies want it. */
template <typename Tile> __device__ __forceinline__ int piece_offset(int row, int piece) {
    constexpr int kPieces = Tile::box_pieces;
    const int swizzled = piece % kPieces ^ (row * kPieces / 8) % kPieces;
    return piece / kPieces * Tile::box_bytes + (row * kPieces + swizzled) * 16;
}

/* Eight columns of this thread's two rows, with the bias, rounded: rows l / 4 and l / 4 + 8 of its warp. */
template <typename T>
__device__ __forceinline__ void finish_columns(uint32_t *m, const float *sum, const float *bias, int column) {
    const float2 b = *reinterpret_cast<const float2 *>(bias + column + threadIdx.x % 4 * 2);
    m[0] = finish_pair<T>(sum[0], sum[1], b);
    m[1] = finish_pair<T>(sum[2], sum[3], b);
}

/* Outputs leave through boxes in shared memory, as many at once as there is room for. */
template <typename T, typename Tile>
__device__ __forceinline__ void store_tile(const float (&sum)[Tile::own_outputs / 2], const Product &p,
                                           const Place &place, char *out, const float *bias) {
    constexpr int kAtOnce = Tile::boxes_at_once, kPieces = kAtOnce * Tile::box_pieces, kAll = Tile::own_outputs / 8;
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, half = threadIdx.x / 128;
    const uint32_t out_address = shared_address(out);
    const Segment &segment = p.segment[place.segment];
#pragma unroll
    for (int first = 0; first < kAll; first += kPieces) {
        if (thread == 0) store_wait_read();
        warps_barrier(1 + half, 128);
#pragma unroll
        for (int i = 0; i < kPieces && first + i < kAll; i += 2) {
            const int j = first + i;
            const uint32_t to = out_address + piece_offset<Tile>(warp * 16 + lane % 16, i + lane / 16);
            uint32_t m[4];
            finish_columns<T>(m, sum + 4 * j, bias, 8 * j);
            if (j + 1 < kAll) {
                finish_columns<T>(m + 2, sum + 4 * j + 4, bias, 8 * j + 8);
                stmatrix_x4(to, m);
            } else {
                stmatrix_x2(to, {m[0], m[1]});
            }
        }
        fence_async_shared();
        warps_barrier(1 + half, 128);
        if (p.out_boxes) {
            if (thread == 0) {
                for (int i = 0; i < kPieces && first + i < kAll; i += Tile::box_pieces)
                    store_box(&segment.out, place.output + (first + i) * 8, place.token,
                              out_address + i / Tile::box_pieces * Tile::box_bytes);
                store_commit();
            }
            continue;
        }
        for (int i = thread; i < kPieces * 64; i += 128) {
            const int row = i / kPieces, piece = i % kPieces, output = place.output + (first + piece) * 8;
            if (first + piece >= kAll || place.token + row >= p.tokens || output >= segment.outputs) continue;
            T *to = row_address<T>(p.out, p.inner, place.token + row) + segment.first_output + output;
            store_packet(to, *reinterpret_cast<const Packet<T> *>(out + piece_offset<Tile>(row, piece)),
                         segment.outputs - output, reinterpret_cast<uintptr_t>(to) % 16 == 0);
        }
        warps_barrier(1 + half, 128);
    }
}

} // namespace

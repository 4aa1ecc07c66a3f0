/* wgmma_product.cuh: tiles of a projection on Hopper's tensor cores, as the warps of a CTA see them.
 *
 * A CTA owns a tile of 128 (or 64) tokens x N outputs and walks over hidden in steps of 64. One thread brings the steps
 * to a ring in shared memory by tensor copies; two warpgroups multiply half of the tile each, or every second tile, and
 * then one stores while the other multiplies. The ring runs on over the CTA's tiles, so the copies of a tile begin
 * while the one before it is still being stored.
 *
 * Two CTAs of a cluster have different tokens and the same outputs: each brings half of the weights and sends it to
 * both.
 *
 * An output's bits do not depend on the number of tokens where the tiles are 128 high: the tensor cores add the same
 * groups of 16 k in the same order for every one of them. */
#pragma once

#include "cuda/arch/ptx.cuh"
#include "cuda/arch/slot.cuh"
#include "cuda/arch/tensor_map.cuh"
#include "cuda/arch/tma.cuh"
#include "cuda/arch/turns.cuh"
#include "cuda/arch/wgmma.cuh"
#include "cuda/linear/wgmma_tiles.cuh"
#include "cuda/norm/norm_rows.cuh"

namespace {

constexpr int kRowBytes = 2 * kStep;
constexpr int kWarpgroups = 2, kFewestThreads = kConsumers + 32, kMostThreads = kConsumers + 128;
constexpr int kSmemBytes = 227 << 10; /* of a Hopper CTA */
constexpr int kMaxStages = 48, kMostLateStages = 16;
constexpr int whole_kilobytes(int bytes) { return (bytes + 1023) / 1024 * 1024; }
/* Barriers of some of the warps: 1 and 2 are those of one warpgroup; turns.cuh has others. */
constexpr int kExchangeBarrier = 3;

/* Outputs leave in boxes of 64 tokens and so many columns; the last one of a tile may be narrow. */
constexpr int kBoxColumns = 32, kNarrowColumns = 16, kBoxPieces = kBoxColumns / 8, kBoxBytes = 64 * kBoxColumns * 2;

/* Shared memory that a tile leaves to the norm of the next call, whose CTAs (1.1 KB) are there before its own end. */
constexpr int kLeftBytes = 5 << 10;

/* Of a warpgroup's boxes: as many as there is room for at once, at most so many, in rounds of equal size. */
constexpr int boxes_at_once_of(int boxes, int most, int other_bytes, int stage_bytes) {
    const auto left = [=](int at_once) {
        return (kSmemBytes - whole_kilobytes(kWarpgroups * at_once * kBoxBytes + other_bytes)) % stage_bytes;
    };
    while (most > 1 && left(most) < kLeftBytes) most--;
    const int rounds = (boxes + most - 1) / most;
    return (boxes + rounds - 1) / rounds;
}

/* kInOut: of an in_out weight. kLate: of x that is not normalised yet; a row of norm weights comes with each stage
 * (late_product.cuh). kAdds..: an addend joins the outputs. kGated: the first half of a tile's outputs are the gate's,
 * the second half those of up for the same columns of out, so that a thread has both sums of a pair. */
enum class WgmmaForm { kPlain, kInOut, kLate, kAdds, kAddsInOut, kGated };

/* M tokens x N outputs, and what shared memory holds: boxes of outputs on their way out (a part of each warpgroup's),
 * biases, barriers, then the ring. Of 64 tokens both warpgroups multiply all, every second step each, because waiting
 * for a step takes longer than multiplying it; then each stores half of the outputs, and instead of boxes there are the
 * sums that the other one gives it. */
template <Sharing kSharing, int kOutputs, WgmmaForm kForm> struct WgmmaTile {
    static constexpr bool shared_tokens = kSharing == Sharing::kTokens, shared_steps = kSharing == Sharing::kSteps,
                          whole = kSharing == Sharing::kTiles;
    static constexpr bool adds = kForm == WgmmaForm::kAdds || kForm == WgmmaForm::kAddsInOut;
    static constexpr bool in_out = kForm == WgmmaForm::kInOut || kForm == WgmmaForm::kAddsInOut,
                          late = kForm == WgmmaForm::kLate;
    static constexpr bool gated = kForm == WgmmaForm::kGated;
    static constexpr bool spare_warps = has_spare_warps(kSharing, kOutputs) && !late && !adds; /* an addend: no norm */
    static constexpr int M = tile_tokens(kSharing), N = kOutputs;
    static constexpr int own_parts = whole ? M / 64 : 1;         /* 64 tokens each, that a warpgroup multiplies */
    static constexpr int own_outputs = shared_steps ? N / 2 : N; /* that it stores */
    static constexpr int columns = gated ? N / 2 : N;            /* of out; rows of a matrix of weights */
    static constexpr int own_columns = gated ? own_outputs / 2 : own_outputs;
    static constexpr int step_turns = shared_steps ? kWarpgroups : 1, tile_turns = whole ? kWarpgroups : 1;
    static constexpr int releasing_warps = shared_tokens ? 4 * kWarpgroups : 4; /* of a slot */
    static constexpr bool trades_registers = whole || (late && kOutputs > 192); /* with a third warpgroup */
    static constexpr int own_registers = 224, other_registers = 3 * 168 - 2 * own_registers;
    static constexpr int x_bytes = M * kRowBytes;
    static constexpr int chunks = (N + kStep - 1) / kStep, chunk_bytes = kStep * kRowBytes; /* of an in_out weight */
    static constexpr int w_bytes = in_out ? chunks * chunk_bytes : N * kRowBytes;
    static constexpr int stage_bytes = x_bytes + w_bytes;
    static constexpr int wide_boxes = own_columns / kBoxColumns, boxes = (own_columns + kBoxColumns - 1) / kBoxColumns;
    static constexpr int bias_bytes = kWarpgroups * own_outputs * 4, barrier_bytes = 16 * kMaxStages;
    static constexpr int most_boxes = own_columns <= 160 ? boxes : (boxes + 1) / 2;
    static constexpr int boxes_at_once =
        late ? most_boxes : boxes_at_once_of(boxes, most_boxes, bias_bytes + barrier_bytes, stage_bytes);
    static constexpr int own_out_bytes = shared_steps ? 64 * own_outputs * 4 : boxes_at_once * kBoxBytes;
    static constexpr int out_bytes = kWarpgroups * own_out_bytes;
    static constexpr int barriers_at = out_bytes + bias_bytes;
    static constexpr int norm_weights_at = whole_kilobytes(barriers_at + barrier_bytes);
    static constexpr int ring_at = norm_weights_at + (late ? kMostLateStages * kRowBytes : 0);
    static constexpr int ring_bytes = kSmemBytes - ring_at; /* at most */
    static constexpr int stages = ring_bytes / stage_bytes;
    static_assert(stages >= 3);
    static_assert(!late || (shared_tokens && !in_out && stages <= kMostLateStages));
    static_assert(!in_out || shared_tokens);
    static_assert(shared_steps || own_columns % kNarrowColumns == 0);
    static_assert(!gated || N % 32 == 0); /* half a tile, and half of that, are whole groups of eight columns */
};

/* Consecutive outputs that one matrix of weights makes. Of a gated layer the first segment has the tiles, and the
 * weights and the bias of up are the second one's. */
struct Segment {
    int outputs;
    unsigned tiles;
    int64_t first_output;
    const void *bias;
    mv_dtype bias_dtype;
};

struct WgmmaProduct {
    CUtensorMap x, norm_weight;                   /* the latter where the row factor joins late */
    CUtensorMap weight[3], box[3], narrow_box[3]; /* of each segment; of its outputs */
    Segment segment[3];
    mv_rows out;
    int64_t inner, tokens;
    int steps;              /* along hidden */
    int high, box_rows;     /* tokens of x that a stage has room for, and that copies bring */
    int last_token;         /* where the last whole tile of x begins */
    int stages;             /* of the ring, of a tile of 64 tokens */
    int early;              /* steps of weights that are asked for before x */
    unsigned rows, columns; /* of tiles: a row is as high as the cluster has CTAs */
    unsigned group;         /* rows that walk over all columns together */
    unsigned cluster;
    bool out_boxes; /* outputs leave by tensor copies */
    bool static_weights;
    mv_task norm; /* what makes the rows from counters.first_row on */
    RowCounters counters;
    mv_rows addend;
    float scale; /* of the outputs that it joins, */
    bool once;   /* which are rounded once */
};

/* The tile of a CTA. The last one of a row begins early enough to be whole, where there are that many outputs: copies
 * that reach past the end of a matrix are slow, and what two tiles both have is the same. So does the last one of a
 * column, of x as the caller has it (y has padded_tokens). But where an addend joins, out may be where the addends are:
 * there a tile stores what is its own, from own_token and own_output on, and leaves the rest to the one in front. */
struct WgmmaPlace {
    int token, segment, output;
    int own_token, own_output;
};

template <typename Tile>
__device__ __forceinline__ WgmmaPlace find_wgmma_place(const WgmmaProduct &p, unsigned item, unsigned rank) {
    const TileIndex index = index_tile<true>(item, p.rows, p.columns, p.group);
    unsigned tile = index.column;
    int segment = 0;
    while (tile >= p.segment[segment].tiles) tile -= p.segment[segment++].tiles;
    const int token = static_cast<int>((index.row * p.cluster + rank) * Tile::M),
              output = static_cast<int>(tile * Tile::columns), outputs = p.segment[segment].outputs;
    const bool moves = !Tile::adds || outputs % 8 == 0; /* addends: what is its own begins with a piece of eight */
    return {min(token, p.last_token), segment, moves ? max(0, min(output, outputs - Tile::columns)) : output, token,
            output};
}

/* The ring. The stages of a tile of 64 tokens have as many rows of x as there are tokens: products read past those, and
 * what comes of that is not stored. */
template <typename Tile> struct WgmmaRing {
    uint32_t at, full, empty; /* the first stage, its barriers */
    uint32_t norm_weights;
    int x_bytes, stage_bytes, stages;

    __device__ __forceinline__ WgmmaRing(const WgmmaProduct &p, uint32_t shared)
        : at(shared + Tile::ring_at), full(shared + Tile::barriers_at), norm_weights(shared + Tile::norm_weights_at),
          x_bytes(Tile::x_bytes), stage_bytes(Tile::stage_bytes), stages(Tile::stages) {
        if constexpr (Tile::shared_steps) {
            x_bytes = p.high * kRowBytes;
            stage_bytes = x_bytes + Tile::w_bytes;
            stages = p.stages;
        }
        empty = full + 8 * stages;
    }

    /* By one thread, stages from the first on, so many apart. */
    __device__ __forceinline__ void init_barriers(int first, int end, int apart, unsigned cluster) const {
#pragma unroll 1
        for (int stage = first; stage < end; stage += apart) {
            mbarrier_init(full + 8 * stage, 1);
            mbarrier_init(empty + 8 * stage, Tile::releasing_warps * cluster);
        }
        mbarrier_init_fence();
    }
};

/* Stages whose barriers the producer initialises itself: one takes some 50 cycles, and the first weights shall not wait
 * for those of many stages. In a cluster, all copies wait until both CTAs are ready. */
__device__ __forceinline__ int own_stages(const WgmmaProduct &p, int stages) {
    return p.cluster > 1 ? 0 : min(4, stages);
}

/* ---- the producer ---------------------------------------------------------------------------------------------- */

/* Brings what a tile needs, step by step, to the ring. kShared: the weights come in halves, one from each CTA; of a
 * gated layer the gate's from the first, and those of up from the second. */
template <typename Tile, bool kShared> struct Producer {
    const WgmmaProduct &p;
    WgmmaRing<Tile> ring;
    unsigned rank;

    /* That copies bring for a step. */
    __device__ __forceinline__ uint32_t bytes() const {
        return p.box_rows * kRowBytes + Tile::w_bytes + (Tile::late ? kRowBytes : 0);
    }

    __device__ __forceinline__ void load_x(const WgmmaPlace &place, int slot, int step) const {
        load_box(ring.at + slot * ring.stage_bytes, &p.x, step * kStep, place.token, ring.full + 8 * slot);
    }

    __device__ __forceinline__ void load_w(const CUtensorMap *map, const WgmmaPlace &place, int slot, int step) const {
        const uint32_t to = ring.at + slot * ring.stage_bytes + ring.x_bytes, barrier = ring.full + 8 * slot;
        if constexpr (Tile::late)
            load_box(ring.norm_weights + slot * kRowBytes, &p.norm_weight, step * kStep, 0, barrier);
        if constexpr (Tile::in_out) {
#pragma unroll
            for (int c = 0; c < Tile::chunks; c++)
                load_part<kStep>(to + c * Tile::chunk_bytes, map, place.output + c * kStep, step * kStep, barrier);
        } else if constexpr (Tile::gated) {
            constexpr int kHalf = Tile::columns * kRowBytes;
            if constexpr (kShared) {
                load_box_multicast(to + rank * kHalf, map + rank, step * kStep, place.output, barrier, 3);
            } else {
                load_box(to, map, step * kStep, place.output, barrier);
                load_box(to + kHalf, map + 1, step * kStep, place.output, barrier);
            }
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
    __device__ __forceinline__ void await(const WgmmaPlace &place) const {
        await_rows(p.counters, place.token / kBlockRows * kBlockRows, static_cast<int>(p.tokens));
        fence_async_global();
    }

    /* Steps whose weights are asked for before the wait: static ones come before x, and few enough not to delay it; of
     * the others only L2 hears. */
    __device__ __forceinline__ int ahead() const {
        return min(p.static_weights ? min(ring.stages, p.early) : ring.stages, p.steps);
    }

    __device__ __forceinline__ void load_early(const WgmmaPlace &place, int slot) const {
        mbarrier_arrive_expect(ring.full + 8 * slot, bytes());
        load_w(&p.weight[place.segment], place, slot, slot);
    }

    /* The same weights, only to L2: what may still be written is not read. */
    __device__ __forceinline__ void prefetch_early(const WgmmaPlace &place, int step) const {
        constexpr int kRows = Tile::in_out ? kStep : Tile::N, kOwn = kShared ? kRows / kCluster : kRows;
        const CUtensorMap *const map = &p.weight[place.segment];
        const int own = kShared ? static_cast<int>(rank) * kOwn : 0;
        if constexpr (Tile::in_out) {
#pragma unroll
            for (int c = 0; c < Tile::chunks; c++) prefetch_box(map, place.output + c * kStep, step * kStep + own);
        } else if constexpr (Tile::gated) {
            if (!kShared || rank == 0) prefetch_box(map, step * kStep, place.output);
            if (!kShared || rank == 1) prefetch_box(map + 1, step * kStep, place.output);
        } else {
            prefetch_box(map, step * kStep, place.output + own);
        }
    }

    /* What comes before the wait for the kernel in front. */
    __device__ __forceinline__ void ask_early(const WgmmaPlace &place, int slot) const {
        p.static_weights ? load_early(place, slot) : prefetch_early(place, slot);
    }

    /* The first stages: their weights are on their way while others still initialise barriers. */
    __device__ __forceinline__ void start(const WgmmaPlace &place, int stages) const {
#pragma unroll 1
        for (int slot = 0; slot < stages; slot++) {
            ring.init_barriers(slot, slot + 1, 1, 1);
            if (slot < ahead()) ask_early(place, slot);
        }
    }

    __device__ __forceinline__ void run(WgmmaPlace place, int started, unsigned item, unsigned items,
                                        unsigned apart) const {
        const CUtensorMap *weight = &p.weight[place.segment];
#pragma unroll 1
        for (int slot = started; slot < ahead(); slot++) ask_early(place, slot);
        griddepcontrol_wait();
        griddepcontrol_launch();
        await(place);
        Slot slot;
        int step = 0;
        const int loaded = p.static_weights ? ahead() : 0;
#pragma unroll 1
        for (; step < loaded; step++, slot.advance(ring.stages)) load_x(place, slot.index, step);
        for (;;) {
#pragma unroll 1
            for (; step < p.steps; step++, slot.advance(ring.stages)) {
                mbarrier_wait(ring.empty + 8 * slot.index, slot.parity ^ 1);
                mbarrier_arrive_expect(ring.full + 8 * slot.index, bytes());
                load_x(place, slot.index, step);
                load_w(weight, place, slot.index, step);
            }
            item += apart;
            if (item >= items) break;
            place = find_wgmma_place<Tile>(p, item, rank);
            weight = &p.weight[place.segment];
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

/* A warpgroup's sums of a tile, of all steps or of every second. Nothing hides what lies between two steps:
 * 25 ns more of it were 0.4 us of a short row (docs/speed/many_tokens.md). So all of it is in uniform registers, and no
 * more than must be. another: the other warpgroup has a tile after this one. */
template <typename T, typename Tile>
__device__ __forceinline__ void multiply_wgmma(float (&sum)[Tile::own_parts][Tile::N / 2], const WgmmaRing<Tile> &ring,
                                               Slot &slot, int steps, unsigned ctas, bool another) {
    constexpr bool kInOut = Tile::in_out;
    const uint32_t half = uniform(threadIdx.x / 128);
    const uint32_t own_x = Tile::shared_tokens ? half * (Tile::x_bytes / 2) : 0;
    const auto multiply_step = [&](bool add) {
        mbarrier_wait(ring.full + 8 * slot.index, slot.parity);
        const uint32_t x_at = ring.at + slot.index * ring.stage_bytes, w_at = x_at + ring.x_bytes;
        const uint64_t x = operand_descriptor(x_at + own_x);
        const uint64_t w = kInOut ? operand_descriptor(w_at, Tile::chunk_bytes) : operand_descriptor(w_at);
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < kStep / 16; k++)
#pragma unroll
            for (int own = 0; own < Tile::own_parts; own++)
                wgmma<T, Tile::N, kInOut>(sum[own], advance_descriptor(x, own * 64 * kRowBytes + k * 32),
                                          advance_descriptor(w, k * (kInOut ? 16 * kRowBytes : 32)), add || k > 0);
        wgmma_commit();
        slot.advance(ring.stages, Tile::step_turns);
    };
    int step = 0;
    if (Tile::shared_steps) {
        step = min(static_cast<int>(half), steps);
        slot.advance(ring.stages, step);
#pragma unroll
        for (float &of : sum[0]) of = 0; /* a single step leaves the second warpgroup without one */
    }
    Slot previous = slot; /* not released yet */
    const bool any = step < steps;
    if (any) {
        multiply_step(Tile::shared_steps);
        step += Tile::step_turns;
    }
#pragma unroll 1
    for (; step < steps; step += Tile::step_turns) {
        multiply_step(true);
        wgmma_wait<1>();
        release(ring.empty, previous.index, ctas);
        previous.advance(ring.stages, Tile::step_turns);
    }
    if (another) give_turn(half);
    wgmma_wait<0>();
    if (any) release(ring.empty, previous.index, ctas);
    slot.retreat(ring.stages, step - steps); /* to the next tile's first step */
#pragma unroll
    for (int own = 0; own < Tile::own_parts; own++) wgmma_results(sum[own]);
}

/* Each warpgroup gives the other one the sums of the outputs which that one stores: half of all, or of a gated layer
 * half of the gate's and half of up's. */
template <typename Tile> __device__ __forceinline__ void
exchange(float (&own)[Tile::own_outputs / 2], const float (&sum)[Tile::N / 2], char *smem, int half) {
    constexpr int kOwn = Tile::own_outputs / 2;
    const int thread = threadIdx.x % 128;
    constexpr int kApart = Tile::gated ? kOwn / 2 : kOwn; /* the second warpgroup's from the first one's */
    const auto place = [&](int of) { return reinterpret_cast<float *>(smem + of * Tile::own_out_bytes) + thread; };
    const auto first = [](int i) { return i < kApart ? i : i + kApart; };
#pragma unroll
    for (int i = 0; i < kOwn; i++) place(1 - half)[i * 128] = half ? sum[first(i)] : sum[first(i) + kApart];
    warps_barrier(kExchangeBarrier, kConsumers);
#pragma unroll
    for (int i = 0; i < kOwn; i++) own[i] = (half ? sum[first(i) + kApart] : sum[first(i)]) + place(half)[i * 128];
}

} // namespace

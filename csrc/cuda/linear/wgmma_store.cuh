/* wgmma_store.cuh: how the sums of a tile (wgmma_product.cuh) become outputs: through boxes in shared memory, which
 * tensor copies or ordinary stores bring to their places; of few tokens straight from the registers. Their loops are
 * unrolled, since sums are registers, and so are made once for each activation: with all three in every turn the code
 * of a gated layer's tile was more than the instruction caches of an SM hold. */
#pragma once

#include "cuda/linear/epilogue.cuh"
#include "cuda/linear/wgmma_product.cuh"

namespace {

/* Where a piece of eight outputs of a row lies among the boxes: swizzled as tensor copies want it. */
__device__ __forceinline__ int piece_offset(int row, int piece, bool narrow) {
    const int pieces = narrow ? kNarrowColumns / 8 : kBoxPieces;
    const int swizzled = piece % pieces ^ (row * pieces / 8) % pieces;
    return piece / kBoxPieces * kBoxBytes + (row * pieces + swizzled) * 16;
}

/* Calls store with the activation as a constant; where the layer is not gated there is none, and any will do. */
template <typename Tile, typename Store>
__device__ __forceinline__ void by_activation(const WgmmaProduct &p, const Store &store) {
    if constexpr (Tile::gated)
        with_activation(p.norm, store);
    else
        store(KnownActivation<MV_SILU>{});
}

/* This thread's pair of biases in eight columns. */
__device__ __forceinline__ float2 bias_pair(const float *bias, int column) {
    return *reinterpret_cast<const float2 *>(bias + column + threadIdx.x % 4 * 2);
}

/* kColumns / 8 times this thread's pairs of eight columns, in two rows, rounded: rows l / 4 and l / 4 + 8 of its warp.
 * Of a tile with addends the bias is in the sums already; of a gated one there are the sums of the gate, and half a
 * tile behind them those of up. */
template <typename T, typename Tile, mv_activation kActivation, int kColumns>
__device__ __forceinline__ void finish_columns(uint32_t (&words)[kColumns / 4], const float *sum, const WgmmaProduct &p,
                                               const float *bias, int column) {
    float out[kColumns / 2];
    const auto with_bias = [&](float(&to)[kColumns / 2], const float *from, int first) {
#pragma unroll
        for (int i = 0; i < kColumns / 2; i += 4) {
            const float2 b = Tile::adds ? float2{} : bias_pair(bias, first + 2 * i);
#pragma unroll
            for (int v = 0; v < 4; v++) to[i + v] = Tile::adds ? from[i + v] : from[i + v] + (v % 2 ? b.y : b.x);
        }
    };
    with_bias(out, sum, column);
    if constexpr (Tile::gated) {
        float up[kColumns / 2];
        with_bias(up, sum + Tile::own_outputs / 4, Tile::own_columns + column);
        join_up<T, kActivation>(p.norm, out, up);
    }
#pragma unroll
    for (int w = 0; w < kColumns / 4; w++) words[w] = pack_word<T>(out + 2 * w);
}

/* Is all of a tile its own? */
__device__ __forceinline__ bool is_own(const WgmmaPlace &place) {
    return place.token >= place.own_token && place.output >= place.own_output;
}

/* Outputs leave through boxes in shared memory, as many at once as there is room for. */
template <typename T, typename Tile, mv_activation kActivation>
__device__ __forceinline__ void store_tile(const float (&sum)[Tile::own_outputs / 2], const WgmmaProduct &p,
                                           const WgmmaPlace &place, char *out, const float *bias) {
    constexpr int kAtOnce = Tile::boxes_at_once, kPieces = kAtOnce * kBoxPieces, kAll = Tile::own_columns / 8;
    constexpr int kWide = Tile::wide_boxes * kBoxPieces;
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, half = threadIdx.x / 128;
    const uint32_t out_address = shared_address(out);
    const Segment &segment = p.segment[place.segment];
    const bool boxed = p.out_boxes && (!Tile::adds || is_own(place));
#pragma unroll
    for (int first = 0; first < kAll; first += kPieces) {
        if (thread == 0) store_wait_read();
        warps_barrier(1 + half, 128);
#pragma unroll
        for (int i = 0; i < kPieces && first + i < kAll; i += 2) {
            const int j = first + i;
            const uint32_t to = out_address + piece_offset(warp * 16 + lane % 16, i + lane / 16, j >= kWide);
            uint32_t m[4];
            finish_columns<T, Tile, kActivation, 16>(m, sum + 4 * j, p, bias, 8 * j);
            stmatrix_x4(to, m);
        }
        fence_async_shared();
        warps_barrier(1 + half, 128);
        if (boxed) {
            if (thread == 0) {
                for (int i = 0; i < kPieces && first + i < kAll; i += kBoxPieces)
                    store_box(first + i < kWide ? &p.box[place.segment] : &p.narrow_box[place.segment],
                              place.output + (first + i) * 8, place.token, out_address + i / kBoxPieces * kBoxBytes);
                store_commit();
            }
            continue;
        }
        for (int i = thread; i < kPieces * 64; i += 128) {
            const int row = i / kPieces, piece = i % kPieces, output = place.output + (first + piece) * 8;
            if (first + piece >= kAll || place.token + row >= p.tokens || output >= segment.outputs) continue;
            if (Tile::adds && (place.token + row < place.own_token || output < place.own_output)) continue;
            T *to = row_address<T>(p.out, p.inner, place.token + row) + segment.first_output + output;
            store_packet(to,
                         *reinterpret_cast<const Packet<T> *>(out + piece_offset(row, piece, first + piece >= kWide)),
                         segment.outputs - output, reinterpret_cast<uintptr_t>(to) % 16 == 0);
        }
        warps_barrier(1 + half, 128);
    }
}

/* Where the rows of this thread's sums of a tile begin, in out or among the addends; null past the last token. */
template <typename T> struct PairRows {
    T *to[2] = {};

    __device__ __forceinline__ PairRows(const WgmmaProduct &p, mv_rows rows, const WgmmaPlace &place) {
        const int first = place.token + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (first + 8 * i < p.tokens)
                to[i] =
                    row_address<T>(rows, p.inner, first + 8 * i) + p.segment[place.segment].first_output + place.output;
    }
};

/* The addends of one of this thread's two rows of a tile, in pairs. None past the last token. */
template <typename T, typename Tile> struct RowAddends {
    uint32_t pair[Tile::own_outputs / 8];

    /* Asks for all of them at once. outputs: from the tile's first on. */
    __device__ __forceinline__ void load(const PairRows<const T> &rows, int row, int outputs) {
        const int first = threadIdx.x % 4 * 2;
        const T *const from = rows.to[row];
        const bool whole = reinterpret_cast<uintptr_t>(from) % 4 == 0 && outputs >= Tile::own_outputs;
        const uint16_t *const halves = reinterpret_cast<const uint16_t *>(from);
#pragma unroll
        for (int j = 0; j < Tile::own_outputs / 8; j++)
            pair[j] = from && whole ? load_past_l1(reinterpret_cast<const uint32_t *>(from + 8 * j + first)) : 0;
        if (!from || whole) return;
#pragma unroll
        for (int j = 0; j < Tile::own_outputs / 8; j++) {
            const int n = 8 * j + first;
            if (n < outputs) pair[j] = load_past_l1(halves + n);
            if (n + 1 < outputs) pair[j] |= static_cast<uint32_t>(load_past_l1(halves + n + 1)) << 16;
        }
    }

    /* The biases join the sums of that row, then these. */
    template <Joining kHow> __device__ __forceinline__ void join(float (&sum)[Tile::own_outputs / 2], int row,
                                                                 const WgmmaProduct &p, const float *bias) const {
#pragma unroll
        for (int j = 0; j < Tile::own_outputs / 8; j++) {
            Packet<T> addends = {};
            addends.word[0] = pair[j];
            const float2 b = bias_pair(bias, 8 * j);
            float *const of = sum + 4 * j + 2 * row;
            of[0] = join_addend<T, kHow>(of[0] + b.x, addends.get(0), p.scale);
            of[1] = join_addend<T, kHow>(of[1] + b.y, addends.get(1), p.scale);
        }
    }
};

/* Those of both rows. Where registers hold them beside the sums they are on their way while the tile is multiplied;
 * else a row's come when it is finished. */
template <typename T, typename Tile> struct TileAddends {
    static constexpr bool early = Tile::own_parts == 1 && Tile::own_outputs <= 128;
    RowAddends<T, Tile> row[early ? 2 : 1];

    __device__ __forceinline__ void load_early(const WgmmaProduct &p, const WgmmaPlace &place) {
        if constexpr (early) {
            const PairRows<const T> rows(p, p.addend, place);
#pragma unroll
            for (int i = 0; i < 2; i++) row[i].load(rows, i, p.segment[place.segment].outputs - place.output);
        }
    }

    __device__ __forceinline__ void join(float (&sum)[Tile::own_outputs / 2], const WgmmaProduct &p,
                                         const WgmmaPlace &place, const float *bias) {
        const PairRows<const T> rows(p, p.addend, place);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            RowAddends<T, Tile> &own = row[early ? i : 0];
            if constexpr (!early) {
                if (!rows.to[i]) continue; /* a branch, so that the loads of the second row stay behind the first row */
                own.load(rows, i, p.segment[place.segment].outputs - place.output);
            }
            with_joining(p.scale, p.once, [&](auto known) { own.template join<known.value>(sum, i, p, bias); });
        }
    }
};

/* The outputs of few tokens leave as pairs, from the registers: from the tile's column `begin` to `end`. */
template <typename T, typename Tile, mv_activation kActivation>
__device__ __forceinline__ void store_pairs(const float (&sum)[Tile::own_outputs / 2], const WgmmaProduct &p,
                                            const PairRows<T> &rows, int begin, int end, const float *bias) {
    const int first = threadIdx.x % 4 * 2;
    uint32_t words[Tile::own_columns / 4];
    finish_columns<T, Tile, kActivation, Tile::own_columns>(words, sum, p, bias, 0);
#pragma unroll
    for (int row = 0; row < 2; row++) {
        T *const to = rows.to[row];
        if (!to) continue;
        if (reinterpret_cast<uintptr_t>(to) % 4 == 0 && begin <= 0 && end >= Tile::own_columns) {
#pragma unroll
            for (int j = 0; j < Tile::own_columns / 8; j++)
                *reinterpret_cast<uint32_t *>(to + 8 * j + first) = words[2 * j + row];
            continue;
        }
#pragma unroll
        for (int j = 0; j < Tile::own_columns / 8; j++) {
            const uint32_t word = words[2 * j + row];
#pragma unroll
            for (int odd = 0; odd < 2; odd++)
                if (const int column = 8 * j + first + odd; column >= begin && column < end)
                    reinterpret_cast<uint16_t *>(to)[column] = static_cast<uint16_t>(word >> 16 * odd);
        }
    }
}

} // namespace

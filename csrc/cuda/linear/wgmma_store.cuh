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

/* A pair of outputs: of a tile with addends the bias is in its sums already; of a gated one there are the sums of the
 * gate, and half a tile behind them those of up. */
template <typename T, typename Tile, mv_activation kActivation>
__device__ __forceinline__ uint32_t finish_pair_of(const float *sum, const WgmmaProduct &p, const float *bias,
                                                   int column) {
    if constexpr (Tile::gated) {
        const float *const up = sum + Tile::own_outputs / 4;
        const float2 of_gate = bias_pair(bias, column), of_up = bias_pair(bias, Tile::own_columns + column);
        alignas(4) const T pair[2] = {finish_gated<T, kActivation>(p.norm, sum[0] + of_gate.x, up[0] + of_up.x),
                                      finish_gated<T, kActivation>(p.norm, sum[1] + of_gate.y, up[1] + of_up.y)};
        return *reinterpret_cast<const uint32_t *>(pair);
    } else if constexpr (Tile::adds) {
        return pack_word<T>(sum);
    } else {
        return finish_pair<T>(sum[0], sum[1], bias_pair(bias, column));
    }
}

/* Eight columns of this thread's two rows, rounded: rows l / 4 and l / 4 + 8 of its warp. */
template <typename T, typename Tile, mv_activation kActivation> __device__ __forceinline__ void
finish_columns(uint32_t *m, const float *sum, const WgmmaProduct &p, const float *bias, int column) {
    m[0] = finish_pair_of<T, Tile, kActivation>(sum, p, bias, column);
    m[1] = finish_pair_of<T, Tile, kActivation>(sum + 2, p, bias, column);
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
#pragma unroll
    for (int first = 0; first < kAll; first += kPieces) {
        if (thread == 0) store_wait_read();
        warps_barrier(1 + half, 128);
#pragma unroll
        for (int i = 0; i < kPieces && first + i < kAll; i += 2) {
            const int j = first + i;
            const uint32_t to = out_address + piece_offset(warp * 16 + lane % 16, i + lane / 16, j >= kWide);
            uint32_t m[4];
            finish_columns<T, Tile, kActivation>(m, sum + 4 * j, p, bias, 8 * j);
            finish_columns<T, Tile, kActivation>(m + 2, sum + 4 * j + 4, p, bias, 8 * j + 8);
            stmatrix_x4(to, m);
        }
        fence_async_shared();
        warps_barrier(1 + half, 128);
        if (p.out_boxes) {
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
    __device__ __forceinline__ void join(float (&sum)[Tile::own_outputs / 2], int row, const WgmmaProduct &p,
                                         const float *bias) const {
#pragma unroll
        for (int j = 0; j < Tile::own_outputs / 8; j++) {
            Packet<T> addends = {};
            addends.word[0] = pair[j];
            const float2 b = bias_pair(bias, 8 * j);
            float *const of = sum + 4 * j + 2 * row;
            of[0] = join_addend<T>(of[0] + b.x, addends.get(0), p.scale, p.once);
            of[1] = join_addend<T>(of[1] + b.y, addends.get(1), p.scale, p.once);
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
            own.join(sum, i, p, bias);
        }
    }
};

/* The outputs of few tokens leave as pairs, from the registers; there are `count` from the tile's first on. */
template <typename T, typename Tile, mv_activation kActivation>
__device__ __forceinline__ void store_pairs(const float (&sum)[Tile::own_outputs / 2], const WgmmaProduct &p,
                                            const PairRows<T> &rows, int count, const float *bias) {
    const int first = threadIdx.x % 4 * 2;
    const auto pair = [&](int row, int j) {
        return finish_pair_of<T, Tile, kActivation>(sum + 4 * j + 2 * row, p, bias, 8 * j);
    };
#pragma unroll
    for (int row = 0; row < 2; row++) {
        T *const to = rows.to[row];
        if (!to) continue;
        if (reinterpret_cast<uintptr_t>(to) % 4 == 0 && count >= Tile::own_columns) {
#pragma unroll
            for (int j = 0; j < Tile::own_columns / 8; j++)
                *reinterpret_cast<uint32_t *>(to + 8 * j + first) = pair(row, j);
            continue;
        }
#pragma unroll
        for (int j = 0; j < Tile::own_columns / 8; j++) {
            const uint32_t word = pair(row, j);
#pragma unroll
            for (int odd = 0; odd < 2; odd++)
                if (8 * j + first + odd < count)
                    reinterpret_cast<uint16_t *>(to)[8 * j + first + odd] = static_cast<uint16_t>(word >> 16 * odd);
        }
    }
}

} // namespace

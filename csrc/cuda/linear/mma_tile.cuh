/* mma_tile.cuh: the tile of a tensor core product: how a step of it reaches shared memory, where it lies there, and how
 * the warps take their fragments from it.
 *
 * m: tokens, n: outputs, k: hidden. A step is 64 k. In shared memory the 16-byte pieces of a row change places with
 * each other, so that the eight rows an 8x8 matrix load touches, and the eight pieces a copy writes, cover all 32
 * banks. */
#pragma once

#include "cuda/arch/mma.cuh"
#include "cuda/arch/ptx.cuh"
#include "kernel.h"

constexpr int kStepK = 64;
constexpr int kPiece = 8;           /* 16-bit values in 16 bytes */
constexpr int kParts = kStepK / 16; /* a step is multiplied, and another one copied, in so many turns */

/* m x n of the tile, how many warps share it, the depth of the ring, and CTAs that the registers must leave room
 * for. */
template <int kTileM, int kTileN, int kWarpsM, int kWarpsN, int kRing, int kCtas> struct MmaTile {
    static constexpr int M = kTileM, N = kTileN, stages = kRing, ctas_per_sm = kCtas;
    static constexpr int warps_n = kWarpsN, threads = 32 * kWarpsM * kWarpsN;
    static constexpr int warp_m = M / kWarpsM, warp_n = N / kWarpsN;
    static constexpr int x_bytes = M * kStepK * 2, stage_bytes = x_bytes + N * kStepK * 2;
    static constexpr int smem_bytes = stages * stage_bytes;
    static_assert(warp_m % 16 == 0 && warp_n % 16 == 0, "fragments are 16 x 16");
    static_assert(stages >= 3, "one is multiplied, one arrives, one is on its way");
};

/* The lanes of a sum hold two neighbours of each 8 outputs (mma.cuh). So that a thread has four neighbours of 16, which
 * it stores together, the 8 columns of a matrix are not outputs 0-7 of the 16 but 0, 1, 4, 5, 8, 9, 12, 13, and those
 * of the next are the others. In the in_out layout a matrix load has no such choice. */
template <bool kInOut> __device__ __forceinline__ int output_of(int pair) {
    const int lane = threadIdx.x % 4;
    return kInOut ? pair * 8 + lane * 2 : lane * 4 + pair * 2;
}

/* A matrix of kRows x kColumns on its way to shared memory, step by step, and the pieces of it that a thread copies:
 * one column of them, from every rows_apart-th row. kSpread: its rows are loaded in the order above. */
template <int kRows, int kColumns, int kThreads, bool kSpread> struct Source {
    static constexpr int row_pieces = kColumns / kPiece, row_bytes = kColumns * 2;
    static constexpr int count = kRows * row_pieces / kThreads, rows_apart = kThreads / row_pieces;
    static_assert(kRows * row_pieces % kThreads == 0 && kThreads % row_pieces == 0, "equal copies for all threads");
    static_assert(row_pieces % 8 == 0 && rows_apart % (kSpread ? 16 : 8) == 0, "the same place in all own rows");

    const char *from;  /* the first own piece */
    int64_t apart;     /* bytes from one to the next */
    int rows, columns; /* from there to the end of the matrix */

    static __device__ __forceinline__ int own_row() { return threadIdx.x / row_pieces; }
    static __device__ __forceinline__ int own_piece() { return threadIdx.x % row_pieces; }

    __device__ __forceinline__ void begin(const void *matrix, int64_t row_stride, int64_t rows_left,
                                          int64_t columns_left) {
        from = static_cast<const char *>(matrix) + (own_row() * row_stride + own_piece() * kPiece) * 2;
        apart = rows_apart * row_stride * 2;
        rows = static_cast<int>(min(rows_left, int64_t{INT32_MAX})) - own_row();
        columns = static_cast<int>(min(columns_left, int64_t{INT32_MAX})) - own_piece() * kPiece;
    }

    /* Of a gated layer, whose rows are the gate's and up's in turns: `rows_left` of both, from row `first` of each. */
    __device__ __forceinline__ void begin_pairs(const mv_block *blocks, int64_t first, int64_t rows_left,
                                                int64_t columns_left) {
        const mv_block &block = blocks[own_row() % 2]; /* of all own rows: they are an even number apart */
        const int64_t row = first + own_row() / 2;
        from = static_cast<const char *>(block.weight) + (row * block.row_stride + own_piece() * kPiece) * 2;
        apart = rows_apart * block.row_stride; /* in bytes, of half as many rows */
        rows = static_cast<int>(min(rows_left, int64_t{INT32_MAX})) - own_row();
        columns = static_cast<int>(min(columns_left, int64_t{INT32_MAX})) - own_piece() * kPiece;
    }

    /* Has L2 bring what the copies of this step read. */
    __device__ __forceinline__ void prefetch() const {
        if (own_piece() != 0) return;
#pragma unroll
        for (int i = 0; i < count; i++)
            if (rows > i * rows_apart) prefetch_l2(from + i * apart, min(columns * 2, row_bytes));
    }

    /* Starts a part of the copies. Past the end of the matrix: zeros. */
    __device__ __forceinline__ void copy(uint32_t to, int part) const {
        const int row = own_row(), place = own_piece() ^ (kSpread ? row / 4 % 4 * 2 + row % 2 : row % 8);
#pragma unroll
        for (int i = part; i < count; i += kParts)
            cp_async16(to + (row + i * rows_apart) * row_bytes + (place << 4), from + i * apart,
                       columns > 0 && rows > i * rows_apart);
    }

    __device__ __forceinline__ void advance_columns() {
        from += kStepK * 2;
        columns -= kStepK;
    }
    __device__ __forceinline__ void advance_rows(int64_t row_stride) {
        from += kStepK * 2 * row_stride;
        rows -= kStepK;
    }
};

/* A warp's operands for 16 k. Lane l supplies the address of one row of the matrices (mma.cuh says which lane). */
template <typename Tile, bool kInOut> struct Fragments {
    uint32_t x[Tile::warp_m / 16][4];
    uint32_t w[Tile::warp_n / 16]
              [4]; /* of two columns of 8 outputs: {k 0-7, k 8-15} of the first, then of the second */

    __device__ __forceinline__ void load(uint32_t stage, int part) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int first_m = warp / Tile::warps_n * Tile::warp_m, first_n = warp % Tile::warps_n * Tile::warp_n;
        constexpr int kRowBytes = kStepK * 2;
        /* rows 0-15 of k 0-7, then of k 8-15 */
        const uint32_t x_at = stage + (first_m + lane % 16) * kRowBytes + ((lane / 16 ^ lane % 8) << 4);
#pragma unroll
        for (int i = 0; i < Tile::warp_m / 16; i++) ldmatrix_x4(x[i], (x_at ^ (part << 5)) + i * 16 * kRowBytes);

        const uint32_t w_stage = stage + Tile::x_bytes;
        if constexpr (!kInOut) {
            const int row = lane % 8 / 2 * 4 + lane / 16 * 2 + lane % 2;
            const uint32_t w_at = w_stage + (first_n + row) * kRowBytes + ((lane / 8 % 2 ^ lane % 8) << 4);
#pragma unroll
            for (int j = 0; j < Tile::warp_n / 16; j++) ldmatrix_x4(w[j], (w_at ^ (part << 5)) + j * 16 * kRowBytes);
        } else {
            const uint32_t w_row = w_stage + (part * 16 + lane % 16) * (Tile::N * 2);
#pragma unroll
            for (int j = 0; j < Tile::warp_n / 16; j++)
                ldmatrix_x4_trans(w[j], w_row + (((first_n / kPiece + 2 * j + lane / 16) ^ (lane % 8)) << 4));
        }
    }
};

template <typename Tile> using MmaSums = float[Tile::warp_m / 16][Tile::warp_n / 8][4];

template <typename T, typename Tile, bool kInOut>
__device__ __forceinline__ void multiply_mma(MmaSums<Tile> &sum, const Fragments<Tile, kInOut> &f) {
#pragma unroll
    for (int j = 0; j < Tile::warp_n / 8; j++)
#pragma unroll
        for (int i = 0; i < Tile::warp_m / 16; i++)
            mma_m16n8k16<T>(sum[i][j], f.x[i], f.w[j / 2][j % 2 * 2], f.w[j / 2][j % 2 * 2 + 1]);
}

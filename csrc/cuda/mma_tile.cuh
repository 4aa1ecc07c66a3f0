/* mma_tile.cuh: the tile of a tensor core product: how a step of it reaches shared memory, where it lies there, and how
 * the warps take their fragments from it.
 *
 * m: tokens, n: outputs, k: hidden. A step is 64 k. Shared memory rows are 128 bytes, or a multiple of it, and the
 * 16-byte piece c of row r lies at c ^ (r % 8): the eight rows an 8x8 matrix load touches, and the eight pieces a copy
 * writes, then cover all 32 banks. */
#pragma once

#include "mma.cuh"

constexpr int kStepK = 64;
constexpr int kPiece = 8; /* 16-bit values in 16 bytes */
constexpr int kRowPieces = kStepK / kPiece;
constexpr int kRowBytes = kStepK * 2;
constexpr int kParts = kStepK / 16; /* a step is multiplied, and another one copied, in so many turns */

/* m x n of the tile, how many warps share it, and the depth of the ring. */
template <int kTileM, int kTileN, int kWarpsM, int kWarpsN, int kRing, int kCtas> struct Tile {
    static constexpr int M = kTileM, N = kTileN, stages = kRing;
    static constexpr int warps_n = kWarpsN, threads = 32 * kWarpsM * kWarpsN;
    static constexpr int ctas_per_sm = kCtas; /* that the registers must leave room for */
    static constexpr int warp_m = M / kWarpsM, warp_n = N / kWarpsN;
    static constexpr int x_bytes = M * kRowBytes, w_bytes = N * kRowBytes; /* of a stage */
    static_assert(warp_m % 16 == 0 && warp_n % 16 == 0, "fragments are 16 x 16");
    static_assert(M * kRowPieces % threads == 0 && N * kRowPieces % threads == 0, "equal copies for all threads");
    static_assert(stages >= 3, "one is multiplied, one arrives, one is on its way");
    static_assert(warp_m * (warp_n + kPiece) * 2 * (threads / 32) <= stages * (x_bytes + w_bytes), "the epilogue fits");
};

/* The pieces of k-contiguous rows that a thread copies: one column of pieces, of every threads / 8th row. */
template <int kRows, int kThreads> struct OwnPieces {
    static constexpr int count = kRows * kRowPieces / kThreads;
    static constexpr int rows_apart = kThreads / kRowPieces;
    static_assert(rows_apart % 8 == 0, "the swizzle is the same for all of them");

    static __device__ __forceinline__ int column() { return threadIdx.x % kRowPieces * kPiece; }
    static __device__ __forceinline__ int row(int i) { return threadIdx.x / kRowPieces + i * rows_apart; }
    static __device__ __forceinline__ int offset_bytes(int i) {
        return row(i) * kRowBytes + ((threadIdx.x % kRowPieces ^ row(0) % 8) << 4);
    }
};

/* Starts a part of the copies of 64 k of k-contiguous rows; this thread's pieces. Past hidden: zeros. */
template <int kRows, int kThreads>
__device__ __forceinline__ void copy_rows(const char *const *rows, uint32_t to, int64_t k0, int64_t hidden, int part) {
    using Own = OwnPieces<kRows, kThreads>;
    const int64_t k = k0 + Own::column();
    const bool valid = k < hidden;
#pragma unroll
    for (int i = part; i < Own::count; i += kParts)
        cp_async16(to + Own::offset_bytes(i), rows[Own::row(i)] + (valid ? k * 2 : 0), valid);
}

/* The same of n-contiguous rows (in_out weights): 64 of them, of kColumns values. Piece c of the row of k comes from
 * pieces[c] + k * step_bytes[c]. */
template <int kColumns, int kThreads> __device__ __forceinline__ void
copy_columns(const char *const *pieces, const int64_t *step_bytes, uint32_t to, int64_t k0, int64_t hidden, int part) {
    constexpr int kPieces = kColumns / kPiece;
    static_assert(kPieces % 8 == 0, "the swizzle wants rows of whole 128 bytes");
#pragma unroll
    for (int i = part; i < kStepK * kPieces / kThreads; i += kParts) {
        const int index = threadIdx.x + i * kThreads;
        const int row = index / kPieces, piece = index % kPieces;
        const int64_t k = k0 + row;
        const bool valid = k < hidden;
        cp_async16(to + row * (kColumns * 2) + ((piece ^ (row % 8)) << 4),
                   pieces[piece] + (valid ? k * step_bytes[piece] : 0), valid);
    }
}

/* A warp's operands for 16 k. Lane l supplies the address of one row of the matrices (mma.cuh says which lane). */
template <typename Tile, bool kInOut> struct Fragments {
    uint32_t x[Tile::warp_m / 16][4];
    uint32_t w[Tile::warp_n / 16][4]; /* two columns of n8 tiles: {k 0-7, k 8-15} of the first, then of the second */

    __device__ __forceinline__ void load(uint32_t x_stage, uint32_t w_stage, int step) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int first_m = warp / Tile::warps_n * Tile::warp_m, first_n = warp % Tile::warps_n * Tile::warp_n;
        /* rows 0-15 of k 0-7, then of k 8-15 */
        const uint32_t x_row = x_stage + (first_m + lane % 16) * kRowBytes;
        const uint32_t x_piece = ((2 * step + lane / 16) ^ (lane % 8)) << 4;
#pragma unroll
        for (int i = 0; i < Tile::warp_m / 16; i++) ldmatrix_x4(x[i], x_row + x_piece + i * 16 * kRowBytes);

        if constexpr (!kInOut) {
            const uint32_t w_row = w_stage + (first_n + lane / 16 * 8 + lane % 8) * kRowBytes;
            const uint32_t w_piece = ((2 * step + lane / 8 % 2) ^ (lane % 8)) << 4;
#pragma unroll
            for (int j = 0; j < Tile::warp_n / 16; j++) ldmatrix_x4(w[j], w_row + w_piece + j * 16 * kRowBytes);
        } else {
            const uint32_t w_row = w_stage + (step * 16 + lane % 16) * (Tile::N * 2);
#pragma unroll
            for (int j = 0; j < Tile::warp_n / 16; j++)
                ldmatrix_x4_trans(w[j], w_row + (((first_n / kPiece + 2 * j + lane / 16) ^ (lane % 8)) << 4));
        }
    }
};

template <typename T, typename Tile, bool kInOut> __device__ __forceinline__ void
multiply(float (&sum)[Tile::warp_m / 16][Tile::warp_n / 8][4], const Fragments<Tile, kInOut> &f) {
#pragma unroll
    for (int i = 0; i < Tile::warp_m / 16; i++)
#pragma unroll
        for (int j = 0; j < Tile::warp_n / 8; j++)
            mma_m16n8k16<T>(sum[i][j], f.x[i], f.w[j / 2][j % 2 * 2], f.w[j / 2][j % 2 * 2 + 1]);
}

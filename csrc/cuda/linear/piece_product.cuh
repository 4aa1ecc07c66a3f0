/* piece_product.cuh: the product of a piece of the weight, in shared memory, and a few tokens, by one warp. */
#pragma once

#include "cuda/arch/mma.cuh"
#include "cuda/arch/ptx.cuh"
#include "cuda/arch/reduce.cuh"
#include "kernel.h"

/* Rows of 128 bytes each. */
constexpr int kPieceRows = 16, kPieceBytes = kPieceRows * 128;
template <typename T> constexpr int kPieceColumns = 128 / sizeof(T);

/* In rows of 128 bytes or a multiple, the place of a chunk of 16: odd rows have the halves of 128 bytes swapped, so
 * that the eight lanes that read 4 chunks of two neighbouring rows meet no bank twice. */
__device__ __forceinline__ int swapped(int row, int chunk) { return chunk ^ (row % 2 * 4); }

/* How a warp multiplies a piece by kTokens tokens. A product waits for the one before it that adds to the same sum, so
 * an output's sum is taken in several parts, as many as the caller has registers for: at most kMostChains. 16-bit
 * values: by the tensor cores, the piece being the wide operand. A lane's sums: of every tile of 8 tokens, four; their
 * rows and tokens are those of mma_m16n8k16. */
template <typename T, int kTokens, int kMostChains> struct PieceProduct {
    static constexpr int kTiles = kTokens / 8;
    static constexpr int kChains = kTiles == 1 ? kMostChains : 1; /* sums that do not wait for each other: 1, 2 or 4 */
    struct Sums {
        float v[kChains][kTiles][4] = {};
    };

    /* A lane's token in each tile; one that does not exist is a column that nobody stores. */
    const char *const y;
    int row[kTiles][2]; /* where it begins in y, for each half of 128 bytes */
    __device__ __forceinline__ PieceProduct(const char *y, int tokens, int hidden) : y(y) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++) {
            const int token = tile * 8 + lane / 4, other = lane / 4 % 2, parity = token < tokens ? token : other;
            const int of_token = (parity < tokens ? parity : 0) * hidden * 2;
            row[tile][0] = of_token + swapped(parity, lane % 4) * 16;
            row[tile][1] = of_token + (swapped(parity, lane % 4) ^ 4) * 16;
            compute_now(row[tile][0]);
            compute_now(row[tile][1]);
        }
    }

    /* 64 columns of the tokens as operand: of each lane's token in every tile of 8, two chunks of 8 values. */
    struct Columns {
        uint4 half[2][kTiles];
    };
    __device__ __forceinline__ Columns columns(int k) const {
        Columns columns;
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                columns.half[half][tile] = *reinterpret_cast<const uint4 *>(y + (row[tile][half] + k * 2));
        return columns;
    }

    /* A piece as operand: rows lane / 4 and 8 further, two chunks of each. Rows from `rows` on are zeros: what nobody
     * reads costs shared memory no time. */
    struct Piece {
        uint4 low[2], high[2];
    };
    static __device__ __forceinline__ Piece read(const char *slot, int rows) {
        const int lane = threadIdx.x % 32, offset = lane / 4 * 128 + swapped(lane / 4, lane % 4) * 16;
        Piece piece = {};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (lane / 4 < rows) piece.low[half] = *reinterpret_cast<const uint4 *>(slot + (offset ^ half * 64));
            if (lane / 4 + 8 < rows)
                piece.high[half] = *reinterpret_cast<const uint4 *>(slot + 8 * 128 + (offset ^ half * 64));
        }
        return piece;
    }

    static __device__ __forceinline__ void multiply(const Piece &piece, const Columns &y, Sums &sums) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint4 low = piece.low[half], high = piece.high[half];
            const int chain = half * kChains / 2, next = chain + kChains / 4;
            const uint32_t a[4] = {low.x, high.x, low.y, high.y}, b[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
            for (int n = 0; n < kTiles; n++) {
                mma_m16n8k16<T>(sums.v[chain][n], a, y.half[half][n].x, y.half[half][n].y);
                mma_m16n8k16<T>(sums.v[next][n], b, y.half[half][n].z, y.half[half][n].w);
            }
        }
    }

    /* The warp's sums, token by token, `pitch` floats apart. kPairs: two columns make a token. */
    template <bool kPairs> static __device__ __forceinline__ void store(float *part, int pitch, const Sums &sums) {
        const int lane = threadIdx.x % 32;
        const auto sum = [&](int n, int i) {
            float sum = sums.v[0][n][i];
#pragma unroll
            for (int chain = 1; chain < kChains; chain++) sum += sums.v[chain][n][i];
            return sum;
        };
#pragma unroll
        for (int n = 0; n < kTiles; n++)
#pragma unroll
            for (int i = 0; i < 4; i += kPairs ? 2 : 1) {
                const int column = n * 8 + lane % 4 * 2 + i % 2;
                part[(kPairs ? column / 2 : column) * pitch + lane / 4 + i / 2 * 8] =
                    kPairs ? sum(n, i) + sum(n, i + 1) : sum(n, i);
            }
    }
};

/* float32: by the CUDA cores. A lane has four rows of a piece, lane / 8 and every fourth further, and of those and the
 * tokens the four columns of chunk lane % 8. */
template <int kTokens, int kMostChains> struct PieceProduct<float, kTokens, kMostChains> {
    struct Sums {
        float v[4][kTokens] = {};
    };

    const char *row[kTokens]; /* a token that does not exist is a column that nobody stores */
    __device__ __forceinline__ PieceProduct(const char *y, int tokens, int hidden) {
#pragma unroll
        for (int t = 0; t < kTokens; t++) {
            const int token = t < tokens ? t : 0;
            row[t] = y + token * hidden * 4 + swapped(token, threadIdx.x % 8) * 16;
        }
    }

    struct Columns {
        float4 v[kTokens];
    };
    __device__ __forceinline__ Columns columns(int k) const {
        Columns columns;
#pragma unroll
        for (int t = 0; t < kTokens; t++) columns.v[t] = *reinterpret_cast<const float4 *>(row[t] + k * 4);
        return columns;
    }

    struct Piece {
        float4 v[4];
    };
    static __device__ __forceinline__ Piece read(const char *slot, int rows) {
        Piece piece = {};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = threadIdx.x % 32 / 8 + 4 * i;
            if (row < rows)
                piece.v[i] = *reinterpret_cast<const float4 *>(slot + row * 128 + swapped(row, threadIdx.x % 8) * 16);
        }
        return piece;
    }

    static __device__ __forceinline__ void multiply(const Piece &piece, const Columns &y, Sums &sums) {
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int t = 0; t < kTokens; t++) {
                float &sum = sums.v[i][t];
                sum = fmaf(piece.v[i].x, y.v[t].x, sum);
                sum = fmaf(piece.v[i].y, y.v[t].y, sum);
                sum = fmaf(piece.v[i].z, y.v[t].z, sum);
                sum = fmaf(piece.v[i].w, y.v[t].w, sum);
            }
    }

    template <bool kPairs> static __device__ __forceinline__ void store(float *part, int pitch, const Sums &sums) {
        static_assert(!kPairs);
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int t = 0; t < kTokens; t++) {
                const float total = warp_sum<8>(sums.v[i][t]);
                if (lane % 8 == 0) part[t * pitch + lane / 8 + 4 * i] = total;
            }
    }
};

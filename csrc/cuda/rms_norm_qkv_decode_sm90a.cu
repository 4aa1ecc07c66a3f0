/* rms_norm_qkv_decode_sm90a.cu: RMSNorm and the projection for few tokens on Hopper, at the speed of memory.
 *
 * One block per SM takes an even share of the rows of the weight, in tiles of 16. Its warps share the columns: each copies
 * pieces of 16 rows x 64 columns into slots of its own in shared memory and multiplies those that have arrived by the
 * tokens, the weight being the wide operand of the tensor cores' product. Nothing that the weights need depends on the
 * kernel before, so a block fills its slots as soon as it is resident, and lets the next kernel of the stream start at
 * once: a block takes a little less than half of an SM's shared memory, so that of the next call fills its slots while
 * this one still computes, and memory is never idle. (A third does not fit, so no SM gets two blocks of one call.)
 *
 * Meanwhile the block normalises the tokens into shared memory. What a small shape costs is the latency of what follows the
 * wait for the previous kernel, so that is kept short (SPEED.md): addresses are computed before it, and where all pieces of
 * a warp have a slot it waits for them once.
 *
 * Sums are float32: of each warp's columns in order of k, then over the warps in a fixed order.
 */
#include "cuda.h"
#include "launch.cuh"
#include "mma.cuh"
#include "qkv_epilogue.cuh"
#include "reduce.cuh"
#include "rms_norm.cuh"

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kPieceRows = 16, kPieceColumns = 64;
constexpr int kPieceBytes = kPieceRows * kPieceColumns * 2;
constexpr int kStep = kWarps * kPieceColumns; /* columns that the warps multiply at a time */
constexpr int kMaxRowTiles = 5;               /* of a block */
constexpr int kMaxTokens = 16;
constexpr int kBlockBytes = 113 << 10; /* two blocks, and 1 KB of each for the system, fill the 228 KB of an SM */

/* ---- shared memory ---------------------------------------------------------------------------------------------- */

struct alignas(16) Fixed {
    float squares[kMaxTokens][kWarps]; /* parts of the tokens' sums of squares; zeros where a token has fewer */
    const void *row[kMaxRowTiles * kPieceRows];
    float bias[kMaxRowTiles * kPieceRows];
};
constexpr int kRing = 1536; /* then the norm weights, then y */
constexpr int kMinSlots = 3, kMaxSlots = 6;
static_assert(sizeof(Fixed) <= kRing, "");

/* How a launch is cut. */
struct Split {
    int first_output, rows_per_block, more; /* the first `more` blocks have one row more */
    int log_threads;                        /* of the threads that share a token */
    int slots;                              /* per warp, so many 16 KB of weights are on their way to a block */
    int norm_weight, y;                     /* where they begin in shared memory */
    float inverse_hidden;
    bool in_pairs; /* the norm weights multiply two 16-bit values at a time */
    bool resident; /* all pieces of a warp have a slot */
};

/* In rows of 128 bytes or a multiple, the place of a chunk of 16: odd rows have the halves of 128 bytes swapped, so that
 * the eight lanes that read 4 chunks of two neighbouring rows meet no bank twice. */
__device__ __forceinline__ int swapped(int row, int chunk) { return chunk ^ (row % 2 * 4); }

/* Where rows start: the tokens of this kernel have one stride. */
template <typename T> __device__ __forceinline__ T *token_row(mv_rows rows, int token) {
    return static_cast<T *>(rows.data) + token * rows.inner_stride;
}

/* ---- the tokens ----------------------------------------------------------------------------------------------- */

/* Where this thread begins in the tokens. */
template <typename T> struct Share {
    int token, column;
    const T *x, *residual;
    char *y;

    __device__ __forceinline__ Share(const mv_task &task, const Split &split, char *shared)
        : token(static_cast<int>(threadIdx.x) >> split.log_threads),
          column((threadIdx.x & ((1 << split.log_threads) - 1)) * 8), x(token_row<const T>(task.x, token) + column),
          residual(task.residual.data ? token_row<const T>(task.residual, token) + column : nullptr),
          y(shared + split.y + token * static_cast<int>(task.hidden) * 2 + swapped(token, column / 8) * 16) {
        compute_now(x);
        compute_now(residual);
        compute_now(y);
        compute_now(token);
        compute_now(column);
    }
};

/* Reads the tokens, adds the residual (block 0 writes the sum out), and leaves them in shared memory, their sums of squares
 * in fixed->squares. A thread's packets are `step` columns apart, a multiple of 128: the halves of its chunks' 128 bytes are
 * swapped alike. A token belongs to at least kLanes threads, each of which asks for kBatch packets at a time. */
template <typename T, int kLanes, int kBatch>
__device__ __forceinline__ void read_tokens(const mv_task &task, const Split &split, Share<T> share, Fixed *fixed) {
    const int hidden = static_cast<int>(task.hidden), tokens = static_cast<int>(task.tokens);
    const int step = 8 << split.log_threads, at_once = kThreads >> split.log_threads;
    for (int first = 0; first < tokens; first += at_once) {
        const int columns = share.token < tokens ? hidden - share.column : 0;
        float squares = 0;
        for (int batch = 0; batch < hidden; batch += kBatch * step) {
            Packet<T> s[kBatch];
#pragma unroll
            for (int b = 0; b < kBatch; b++) {
                const int k = batch + b * step;
                if (k >= hidden) break;
                s[b] = as_packet<T>(load_if(share.x + k, k < columns));
            }
            if (share.residual) {
#pragma unroll
                for (int b = 0; b < kBatch; b++) {
                    const int k = batch + b * step;
                    if (k >= hidden) break;
                    s[b] = add_residual(s[b], as_packet<T>(load_if(share.residual + k, k < columns)));
                    if (task.residual_out.data && blockIdx.x == 0 && k < columns)
                        store_packet(token_row<T>(task.residual_out, share.token) + share.column + k, s[b], 8, true);
                }
            }
#pragma unroll
            for (int b = 0; b < kBatch; b++) {
                const int k = batch + b * step;
                if (k >= hidden) break;
                if (k < columns) *reinterpret_cast<Packet<T> *>(share.y + k * 2) = s[b];
#pragma unroll
                for (int i = 0; i < 8; i++) squares = fmaf(s[b].get(i), s[b].get(i), squares);
            }
        }
        squares = warp_sum<kLanes>(squares);
        if (threadIdx.x % kLanes == 0 && columns > 0) fixed->squares[share.token][share.column / 256] = squares;
        share.token += at_once;
        share.x += at_once * task.x.inner_stride;
        if (share.residual) share.residual += at_once * task.residual.inner_stride;
        share.y += at_once * hidden * 2;
    }
}

/* y of 8 values. Where the norm weights of "hf" are of T and have no offset, the second product and its rounding are one
 * instruction for two values. */
template <typename T> __device__ __forceinline__ Packet<T>
normalised(const mv_task &task, bool in_pairs, const Packet<T> &s, float r, const char *norm_weight, int k) {
    if (in_pairs) {
        const Packet<T> weight = *reinterpret_cast<const Packet<T> *>(norm_weight + k * 2);
        Packet<T> y;
#pragma unroll
        for (int w = 0; w < 4; w++) {
            const float v[2] = {s.get(2 * w) * r, s.get(2 * w + 1) * r};
            y.word[w] = multiply_pair<T>(pack_word<T>(v), weight.word[w]);
        }
        return y;
    }
    NormWeights<T> weights;
    if (task.norm_weight_dtype == Dtype<T>::value) {
        weights = widen_norm_weights<T>(task, *reinterpret_cast<const Packet<T> *>(norm_weight + k * 2));
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            weights.v[i] = task.weight_offset + reinterpret_cast<const float *>(norm_weight)[k + i];
    }
    return apply_norm(s, r, weights, task.rounding == MV_ROUNDING_HF);
}

/* Each thread finishes what it has read, four packets at a time while there are as many. */
template <typename T> __device__ __forceinline__ void
normalise_tokens(const mv_task &task, const Split &split, Share<T> share, const Fixed *fixed, const char *norm_weight) {
    constexpr int kBatch = 4;
    const int hidden = static_cast<int>(task.hidden), tokens = static_cast<int>(task.tokens);
    const int step = 8 << split.log_threads, at_once = kThreads >> split.log_threads, left = hidden - share.column;
    for (; share.token < tokens; share.token += at_once, share.y += at_once * hidden * 2) {
        const float4 low = *reinterpret_cast<const float4 *>(fixed->squares[share.token]);
        const float4 high = *reinterpret_cast<const float4 *>(fixed->squares[share.token] + 4);
        const float sum = ((low.x + low.y) + (low.z + low.w)) + ((high.x + high.y) + (high.z + high.w));
        const float r = row_factor(sum, split.inverse_hidden, task.eps);
        const auto packet = [&](int k) -> Packet<T> & { return *reinterpret_cast<Packet<T> *>(share.y + k * 2); };
        int k = 0;
#pragma unroll 1
        for (; k + (kBatch - 1) * step < hidden; k += kBatch * step) {
            Packet<T> y[kBatch];
#pragma unroll
            for (int b = 0; b < kBatch; b++) {
                const int inside = k + b * step < left ? k + b * step : k;
                y[b] = normalised<T>(task, split.in_pairs, packet(inside), r, norm_weight, share.column + inside);
            }
#pragma unroll
            for (int b = 0; b < kBatch; b++)
                if (k + b * step < left) packet(k + b * step) = y[b];
        }
#pragma unroll 1
        for (; k < left; k += step)
            packet(k) = normalised<T>(task, split.in_pairs, packet(k), r, norm_weight, share.column + k);
    }
}

/* 64 columns of the tokens as operand: of each lane's token in every tile of 8, two chunks of 8 values. */
template <int kTiles> struct Columns { uint4 half[2][kTiles]; };

template <int kTiles> __device__ __forceinline__ Columns<kTiles> read_columns(const char *(&row)[kTiles], int k) {
    Columns<kTiles> columns;
#pragma unroll
    for (int tile = 0; tile < kTiles; tile++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            columns.half[half][tile] = *reinterpret_cast<const uint4 *>(
                reinterpret_cast<const char *>(reinterpret_cast<uintptr_t>(row[tile] + k * 2) ^ (half * 64)));
    return columns;
}

/* ---- the weights ------------------------------------------------------------------------------------------------ */

/* Starts to copy the norm weights, each thread a part: a group of copies. */
__device__ __forceinline__ void copy_norm_weight(const mv_task &task, uint32_t to) {
    const int bytes = static_cast<int>(task.hidden) * (task.norm_weight_dtype == MV_F32 ? 4 : 2);
    for (int at = threadIdx.x * 16; at < bytes; at += kThreads * 16)
        cp_async16(to + at, static_cast<const char *>(task.norm_weight) + at, true);
    cp_async_commit();
}

/* Walks over the pieces of a warp: all tiles of rows, then the next columns. */
template <int kRowTiles> struct Walk {
    int tile, column;
    __device__ __forceinline__ void next() {
        tile++;
        if (tile < kRowTiles) return;
        tile = 0;
        column += kStep;
    }
};

/* Starts to copy a piece, if there is one, and closes a group of copies. */
template <int kRowTiles> __device__ __forceinline__ void copy_piece(const Fixed *fixed, const Walk<kRowTiles> &walk,
                                                                    int rows, int hidden, uint32_t slot) {
    const int lane = threadIdx.x % 32;
    if (walk.column < hidden) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = lane / 8 + 4 * i, output = walk.tile * kPieceRows + row;
            if (output < rows)
                cp_async16(slot + row * 128 + swapped(row, lane % 8) * 16,
                           static_cast<const char *>(fixed->row[output]) + walk.column * 2 + lane % 8 * 16, true);
        }
    }
    cp_async_commit();
}

/* Waits for the oldest piece under way: all groups of copies but the youngest slots - 1. */
__device__ __forceinline__ void wait_for_piece(int slots) {
    if (slots == 6)
        cp_async_wait<5>();
    else if (slots == 5)
        cp_async_wait<4>();
    else if (slots == 4)
        cp_async_wait<3>();
    else
        cp_async_wait<kMinSlots - 1>();
}

/* A piece as operand: rows lane / 4 and 8 further, two chunks of each. */
struct Piece {
    uint4 low[2], high[2];
};

__device__ __forceinline__ Piece read_piece(const char *slot) {
    const int lane = threadIdx.x % 32, offset = lane / 4 * 128 + swapped(lane / 4, lane % 4) * 16;
    Piece piece;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        piece.low[half] = *reinterpret_cast<const uint4 *>(slot + (offset ^ half * 64));
        piece.high[half] = *reinterpret_cast<const uint4 *>(slot + 8 * 128 + (offset ^ half * 64));
    }
    return piece;
}

template <typename T, int kTiles, int kChains> __device__ __forceinline__ void
multiply(const Piece &piece, const Columns<kTiles> &y, float (&sum)[kChains][kTiles][4]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint4 low = piece.low[half], high = piece.high[half];
        const uint32_t a[4] = {low.x, high.x, low.y, high.y}, b[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
        for (int n = 0; n < kTiles; n++) {
            float(&part)[4] = sum[half * (kChains - 1)][n];
            mma_m16n8k16<T>(part, a, y.half[half][n].x, y.half[half][n].y);
            mma_m16n8k16<T>(part, b, y.half[half][n].z, y.half[half][n].w);
        }
    }
}

/* ---- the kernel ------------------------------------------------------------------------------------------------- */

/* kTiles: tiles of 8 tokens; kRowTiles: tiles of 16 rows of the weight. */
template <typename T, int kTiles, int kRowTiles> __global__ void __launch_bounds__(kThreads, 2)
    rms_norm_qkv_decode_kernel(const __grid_constant__ mv_task task, const __grid_constant__ Split split) {
    constexpr int kChains = kTiles == 1 ? 2 : 1; /* sums that do not wait for each other */
    extern __shared__ __align__(128) char shared[];
    Fixed *const fixed = reinterpret_cast<Fixed *>(shared);
    const int block = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_row = split.first_output + block * split.rows_per_block + min(block, split.more);
    const int rows = split.rows_per_block + (block < split.more);
    const int hidden = static_cast<int>(task.hidden);
    char *const ring = shared + kRing + warp * split.slots * kPieceBytes;
    const char *const norm_weight = shared + split.norm_weight;

    /* What does not depend on the kernel before. */
    griddepcontrol_launch();
    if (threadIdx.x < rows) fixed->row[threadIdx.x] = weight_row<T>(task, find_output(task, first_row + threadIdx.x));
    if (threadIdx.x < kMaxTokens * kWarps) (&fixed->squares[0][0])[threadIdx.x] = 0;
    __syncthreads();
    if (task.dynamic_weights) griddepcontrol_wait();
    const Share<T> share(task, split, shared);
    copy_norm_weight(task, shared_address(norm_weight));
    Walk<kRowTiles> asked = {0, warp * kPieceColumns};
#pragma unroll 1
    for (int slot = 0; slot < split.slots; slot++) {
        copy_piece(fixed, asked, rows, hidden, shared_address(ring) + slot * kPieceBytes);
        asked.next();
    }
    if (threadIdx.x < rows) fixed->bias[threadIdx.x] = load_bias<T>(task, find_output(task, first_row + threadIdx.x));
    const char *token[kTiles]; /* a lane's in each tile; one that does not exist is a column that nobody stores */
#pragma unroll
    for (int tile = 0; tile < kTiles; tile++) {
        const int exists = tile * 8 + lane / 4 < task.tokens ? tile * 8 + lane / 4 : lane / 4 % 2;
        token[tile] =
            shared + split.y + (exists < task.tokens ? exists : 0) * hidden * 2 + swapped(exists, lane % 4) * 16;
    }
    griddepcontrol_wait();

    read_tokens<T, kTiles == 1 ? 32 : 16, kTiles == 1 ? 4 : 8>(task, split, share, fixed);
    if (split.resident)
        cp_async_wait<0>();
    else
        wait_for_piece(split.slots); /* and for the norm weights, which were asked for before */
    __syncthreads();
    normalise_tokens<T>(task, split, share, fixed, norm_weight);
    __syncthreads();

    float sum[kRowTiles][kChains][kTiles][4] = {};
    const char *slot = ring;
    if (split.resident) {
        for (int k = warp * kPieceColumns; k < hidden; k += kStep) {
            const Columns<kTiles> y = read_columns<kTiles>(token, k);
#pragma unroll
            for (int m = 0; m < kRowTiles; m++, slot += kPieceBytes)
                multiply<T, kTiles, kChains>(read_piece(slot), y, sum[m]);
        }
    } else {
        Piece piece = read_piece(slot);
        const char *const end = ring + split.slots * kPieceBytes;
#pragma unroll 1
        for (int k = warp * kPieceColumns; k < hidden; k += kStep) {
            const Columns<kTiles> y = read_columns<kTiles>(token, k);
#pragma unroll
            for (int m = 0; m < kRowTiles; m++) {
                multiply<T, kTiles, kChains>(piece, y, sum[m]);
                __syncwarp(); /* all lanes have read this piece: its slot is free */
                copy_piece(fixed, asked, rows, hidden, shared_address(slot));
                asked.next();
                slot = slot + kPieceBytes == end ? ring : slot + kPieceBytes;
                wait_for_piece(split.slots);
                __syncwarp();
                piece = read_piece(slot);
            }
        }
    }

    /* The warps' parts of each sum meet where their slots were, token by token; 4 words more than a multiple of 16 keep the
     * lanes' writes out of each other's banks. */
    constexpr int kPitch = kRowTiles * kPieceRows + 4;
    static_assert(kTiles * 8 * kPitch * 4 <= kMinSlots * kPieceBytes, "the parts fit");
    float *const part = reinterpret_cast<float *>(ring);
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kRowTiles; m++)
#pragma unroll
        for (int n = 0; n < kTiles; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = m * kPieceRows + lane / 4 + i / 2 * 8, token = n * 8 + lane % 4 * 2 + i % 2;
                float total = sum[m][0][n][i];
                if (kChains == 2) total += sum[m][kChains - 1][n][i];
                part[token * kPitch + row] = total;
            }
    __syncthreads();
    constexpr int kRowSlots = kRowTiles == 1 ? 16 : kRowTiles == 2 ? 32 : kRowTiles <= 4 ? 64 : 128;
    const int row = threadIdx.x % kRowSlots;
    if (row < rows) {
#pragma unroll 1
        for (int token = threadIdx.x / kRowSlots; token < task.tokens; token += kThreads / kRowSlots) {
            const char *parts = shared + kRing + (token * kPitch + row) * 4;
            float total = 0;
#pragma unroll
            for (int w = 0; w < kWarps; w++)
                total += *reinterpret_cast<const float *>(parts + w * split.slots * kPieceBytes);
            token_row<T>(task.out, token)[first_row + row] = finish_output<T>(total, fixed->bias[row]);
        }
    }
}

/* ---- launchers ------------------------------------------------------------------------------------------------ */

int norm_weight_bytes(const mv_task *task) {
    return static_cast<int>(task->hidden) * static_cast<int>(mv_dtype_bytes(task->norm_weight_dtype));
}

/* As many slots per warp as there is room for. */
int64_t slots_of(const mv_task *task) {
    const int64_t room = kBlockBytes - kRing - norm_weight_bytes(task) - task->tokens * task->hidden * 2;
    const int64_t slots = room / (kWarps * kPieceBytes);
    return slots < kMaxSlots ? slots : kMaxSlots;
}

template <typename T, int kTiles, int kRowTiles>
mv_status launch_rows(const mv_task *task, Split split, int blocks, mv_error *error) {
    split.resident = (task->hidden + kStep - 1) / kStep * kRowTiles <= split.slots;
    const Grid grid = {dim3(static_cast<unsigned>(blocks)), kThreads, kBlockBytes};
    return launch<rms_norm_qkv_decode_kernel<T, kTiles, kRowTiles>>(task, grid, error, *task, split);
}

/* More rows than the blocks can take at once are several launches. */
template <typename T, int kTiles> mv_status launch_decode(const mv_task *task, mv_error *error) {
    const int outputs = static_cast<int>(task->outputs), tokens = static_cast<int>(task->tokens);
    const int blocks = outputs < task->sm_count ? outputs : task->sm_count;
    const int64_t most = static_cast<int64_t>(blocks) * kMaxRowTiles * kPieceRows, parts = (outputs + most - 1) / most;
    Split split = {};
    split.log_threads = tokens == 1 ? 8 : tokens == 2 ? 7 : tokens <= 4 ? 6 : tokens <= 8 ? 5 : 4;
    split.slots = static_cast<int>(slots_of(task));
    split.norm_weight = kRing + split.slots * kWarps * kPieceBytes;
    split.y = split.norm_weight + norm_weight_bytes(task);
    split.inverse_hidden = 1.0f / static_cast<float>(task->hidden);
    split.in_pairs =
        task->rounding == MV_ROUNDING_HF && task->norm_weight_dtype == task->dtype && task->weight_offset == 0;
    mv_status status = MV_OK;
    for (int64_t part = 0; part < parts && status == MV_OK; part++) {
        split.first_output = static_cast<int>(outputs * part / parts);
        const int count = static_cast<int>(outputs * (part + 1) / parts) - split.first_output;
        split.rows_per_block = count / blocks;
        split.more = count % blocks;
        switch ((split.rows_per_block + (split.more > 0) + kPieceRows - 1) / kPieceRows) {
        case 1: status = launch_rows<T, kTiles, 1>(task, split, blocks, error); break;
        case 2: status = launch_rows<T, kTiles, 2>(task, split, blocks, error); break;
        case 3: status = launch_rows<T, kTiles, 3>(task, split, blocks, error); break;
        case 4: status = launch_rows<T, kTiles, 4>(task, split, blocks, error); break;
        default: status = launch_rows<T, kTiles, kMaxRowTiles>(task, split, blocks, error); break;
        }
    }
    return status;
}

template <typename T> mv_status decode(const mv_task *task, mv_error *error) {
    return task->tokens <= 8 ? launch_decode<T, 1>(task, error) : launch_decode<T, 2>(task, error);
}

} // namespace

extern "C" const char *mv_decode_sm90a_fits(const mv_task *task) {
    if (task->compute_capability != 90) return "it is for sm_90";
    if (task->weight_dtype != task->dtype) return "the tensor cores take weights of x's dtype";
    if (task->tokens > kMaxTokens) return "it takes up to 16 tokens";
    if (task->block[0].col_stride != 1) return "it needs weights that are contiguous along the hidden size";
    if (task->hidden % kPieceColumns != 0) return "hidden is no multiple of 64";
    if (task->outputs > 1 << 24) return "it counts in 32 bits: there are too many outputs";
    if (task->hidden > 1 << 16 || slots_of(task) < kMinSlots) return "the tokens do not fit in shared memory";
    if (task->tokens > task->inner) return "the rows of x have two strides";
    if (!norm_rows_aligned<__half>(task) || !is_aligned16(task->norm_weight))
        return "the rows of x, or the norm weight, are not 16-byte aligned";
    for (const mv_block &block : task->block)
        if (block.outputs && (!is_aligned16(block.weight) || block.row_stride % 8 != 0))
            return "the rows of the weight are not 16-byte aligned";
    return nullptr;
}

extern "C" mv_status mv_rms_norm_qkv_f16_decode_sm90a(const mv_task *task, mv_error *error) {
    return decode<__half>(task, error);
}
extern "C" mv_status mv_rms_norm_qkv_bf16_decode_sm90a(const mv_task *task, mv_error *error) {
    return decode<__nv_bfloat16>(task, error);
}

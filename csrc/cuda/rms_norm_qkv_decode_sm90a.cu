/* rms_norm_qkv_decode_sm90a.cu: RMSNorm and the projection for few tokens on Hopper, at the speed of memory.
 *
 * One block per SM takes an even share of the rows of the weight, in tiles of 16. Its warps share the columns: each
 * copies pieces of 16 rows x 128 bytes into slots of its own in shared memory and multiplies those that have arrived by
 * the tokens: 16-bit values on the tensor cores, the weight being the wide operand, float32 on the CUDA cores. Nothing
 * that the weights need depends on the kernel before, so a block asks for them as soon as it is resident, and lets the
 * next kernel of the stream start at once. Where its share is small, a block takes a little less than half of an SM's
 * shared memory: that of the next call fills its slots while this one still computes, and memory is never idle. (A
 * third does not fit, so no SM gets two blocks of one call.) Where it is larger, a block takes all of it: then it
 * matters more how many weights can be on their way while the tokens are normalised.
 *
 * Memory answers in order, and tokens that are asked for after 200 KB of weights come late; so a block that is not done
 * with its weights anyway fills its last slots after it has asked for the tokens. They are normalised into shared
 * memory. What a small shape costs is the latency of what follows the wait for the previous kernel, so that is kept
 * short (SPEED.md): addresses are computed before it, and where all pieces of a warp have a slot it waits for them
 * once.
 *
 * Sums are float32: of each warp's columns in order of k, then over the warps in a fixed order. */
#include "cuda.h"
#include "launch.cuh"
#include "mma.cuh"
#include "piece_product.cuh"
#include "qkv_epilogue.cuh"
#include "reduce.cuh"
#include "rms_norm.cuh"

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
template <typename T> constexpr int kStep = kWarps *kPieceColumns<T>; /* columns that the warps multiply at a time */
constexpr int kMaxRowTiles = 5;                                       /* of a block */
constexpr int kMaxTokens = 16, kMaxTokensFloat32 = 4;
constexpr int kBatch = 4;             /* packets of a token that a thread has in registers */
constexpr int kHalfBytes = 113 << 10; /* two blocks, and 1 KB of each for the system, fill the 228 KB of an SM */
constexpr int kWholeBytes = 227 << 10;

/* ---- shared memory ---------------------------------------------------------------------------------------------- */

struct alignas(16) Fixed {
    float squares[kMaxTokens][kWarps]; /* parts of the tokens' sums of squares; zeros where a token has fewer */
    const void *row[kMaxRowTiles * kPieceRows];
    float bias[kMaxRowTiles * kPieceRows];
};
constexpr int kRing = 1536; /* then the norm weights, then y */
constexpr int kMinSlots = 3, kMaxSlots = 12;
static_assert(sizeof(Fixed) <= kRing, "");

/* How a launch is cut. */
struct Split {
    int first_output, rows_per_block, more; /* the first `more` blocks have one row more */
    int log_threads;                        /* of the threads that share a token */
    int slots;                              /* per warp, so many 16 KB of weights are on their way to a block */
    int norm_weight, y;                     /* where they begin in shared memory */
    float mean_scale;
    bool in_pairs; /* the norm weights multiply two 16-bit values at a time */
    int early;     /* slots that are filled before the tokens are asked for */
    bool resident; /* all pieces of a warp have a slot */
    bool direct;   /* the tokens are read into registers, not copied to shared memory first */
};

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
          column((threadIdx.x & ((1 << split.log_threads) - 1)) * Packet<T>::size),
          x(token_row<const T>(task.x, token) + column),
          residual(task.residual.data ? token_row<const T>(task.residual, token) + column : nullptr),
          y(shared + split.y + token * static_cast<int>(task.hidden * sizeof(T)) +
            swapped(token, column / Packet<T>::size) * 16) {
        compute_now(x);
        compute_now(residual);
        compute_now(y);
        compute_now(token);
        compute_now(column);
    }
};

/* Starts to copy the tokens to where y will be, each thread its share: a group of copies. A thread's packets are `step`
 * columns apart, a multiple of 128 bytes: the halves of its chunks' 128 bytes are swapped alike. */
template <typename T>
__device__ __forceinline__ void copy_tokens(const mv_task &task, const Split &split, Share<T> share) {
    const int hidden = static_cast<int>(task.hidden), tokens = static_cast<int>(task.tokens);
    const int step = Packet<T>::size << split.log_threads, at_once = kThreads >> split.log_threads;
    for (; share.token < tokens; share.token += at_once) {
#pragma unroll 4
        for (int k = 0; k < hidden - share.column; k += step)
            cp_async16(shared_address(share.y + k * sizeof(T)), share.x + k, true);
        share.x += at_once * task.x.inner_stride;
        share.y += at_once * hidden * sizeof(T);
    }
    cp_async_commit();
}

/* Reads the tokens, each thread its share, adds the residual (block 0 writes the sum out), and leaves them in shared
 * memory, their sums of squares in fixed->squares. kDirect: from x, which is at most one batch of packets a thread;
 * otherwise from where copy_tokens has put them. A token belongs to at least kLanes threads. */
template <typename T, int kLanes, bool kDirect>
__device__ __forceinline__ void read_tokens(const mv_task &task, const Split &split, Share<T> share, Fixed *fixed) {
    constexpr int kSize = Packet<T>::size;
    const int hidden = static_cast<int>(task.hidden), tokens = static_cast<int>(task.tokens);
    const int step = kSize << split.log_threads, at_once = kThreads >> split.log_threads;
    for (int first = 0; first < tokens; first += at_once) {
        const int columns = share.token < tokens ? hidden - share.column : 0;
        float squares[2] = {};
        for (int batch = 0; batch < (kDirect ? hidden : columns); batch += kBatch * step) {
            Packet<T> s[kBatch] = {};
#pragma unroll
            for (int b = 0; b < kBatch; b++) {
                const int k = batch + b * step;
                if (kDirect && k >= hidden) break;
                if constexpr (kDirect)
                    s[b] = as_packet<T>(load_if(share.x + k, k < columns));
                else if (k < columns)
                    s[b] = *reinterpret_cast<const Packet<T> *>(share.y + k * sizeof(T));
            }
            if (share.residual) {
                Packet<T> residual[kBatch];
#pragma unroll
                for (int b = 0; b < kBatch; b++) {
                    const int k = batch + b * step;
                    if (kDirect && k >= hidden) break;
                    residual[b] = as_packet<T>(load_if(share.residual + k, k < columns));
                }
#pragma unroll
                for (int b = 0; b < kBatch; b++) {
                    const int k = batch + b * step;
                    if (kDirect && k >= hidden) break;
                    s[b] = add_residual(s[b], residual[b]);
                    if (task.residual_out.data && blockIdx.x == 0 && k < columns)
                        store_packet(token_row<T>(task.residual_out, share.token) + share.column + k, s[b], kSize,
                                     true);
                }
            }
            const bool store = kDirect || share.residual;
#pragma unroll
            for (int b = 0; b < kBatch; b++) {
                const int k = batch + b * step;
                if (kDirect && k >= hidden) break;
                if (store && k < columns) *reinterpret_cast<Packet<T> *>(share.y + k * sizeof(T)) = s[b];
#pragma unroll
                for (int i = 0; i < kSize; i++) squares[i % 2] = fmaf(s[b].get(i), s[b].get(i), squares[i % 2]);
            }
        }
        const float sum = warp_sum<kLanes>(squares[0] + squares[1]);
        if (threadIdx.x % kLanes == 0 && columns > 0) fixed->squares[share.token][share.column / (32 * kSize)] = sum;
        share.token += at_once;
        share.x += at_once * task.x.inner_stride;
        if (share.residual) share.residual += at_once * task.residual.inner_stride;
        share.y += at_once * hidden * sizeof(T);
    }
}

/* y of a packet. */
template <typename T> __device__ __forceinline__ Packet<T>
normalised(const mv_task &task, bool in_pairs, const Packet<T> &s, float r, const char *norm_weight, int k) {
    if constexpr (sizeof(T) == 2)
        if (in_pairs) return apply_norm_hf(s, r, *reinterpret_cast<const Packet<T> *>(norm_weight + k * sizeof(T)));
    NormWeights<T> weights;
    if (task.norm_weight_dtype == Dtype<T>::value) {
        weights = widen_norm_weights<T>(task, *reinterpret_cast<const Packet<T> *>(norm_weight + k * sizeof(T)));
    } else {
#pragma unroll
        for (int i = 0; i < Packet<T>::size; i++)
            weights.v[i] = task.weight_offset + reinterpret_cast<const float *>(norm_weight)[k + i];
    }
    return apply_norm(s, r, weights, task.rounding == MV_ROUNDING_HF);
}

/* Each thread finishes what it has read, four packets at a time while there are as many. */
template <typename T> __device__ __forceinline__ void
normalise_tokens(const mv_task &task, const Split &split, Share<T> share, const Fixed *fixed, const char *norm_weight) {
    const int hidden = static_cast<int>(task.hidden), tokens = static_cast<int>(task.tokens);
    const int step = Packet<T>::size << split.log_threads, at_once = kThreads >> split.log_threads;
    const int left = hidden - share.column;
    for (; share.token < tokens; share.token += at_once, share.y += at_once * hidden * sizeof(T)) {
        const float4 low = *reinterpret_cast<const float4 *>(fixed->squares[share.token]);
        const float4 high = *reinterpret_cast<const float4 *>(fixed->squares[share.token] + 4);
        const float sum = ((low.x + low.y) + (low.z + low.w)) + ((high.x + high.y) + (high.z + high.w));
        const float r = row_factor<T>(sum, split.mean_scale, task);
        const auto packet = [&](int k) -> Packet<T> & {
            return *reinterpret_cast<Packet<T> *>(share.y + k * sizeof(T));
        };
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

/* ---- the weights ------------------------------------------------------------------------------------------------ */

/* Starts to copy the norm weights, each thread a part: a group of copies. */
__device__ __forceinline__ void copy_norm_weight(const mv_task &task, uint32_t to) {
    const int bytes = static_cast<int>(task.hidden) * (task.norm_weight_dtype == MV_F32 ? 4 : 2);
    for (int at = threadIdx.x * 16; at < bytes; at += kThreads * 16)
        cp_async16(to + at, static_cast<const char *>(task.norm_weight) + at, true);
    cp_async_commit();
}

/* Walks over the pieces of a warp: all tiles of rows, then the next columns. */
template <typename T, int kRowTiles> struct Walk {
    int tile, column;
    __device__ __forceinline__ void next() {
        tile++;
        if (tile < kRowTiles) return;
        tile = 0;
        column += kStep<T>;
    }
};

/* Starts to copy a piece, if there is one, and closes a group of copies. */
template <typename T, int kRowTiles> __device__ __forceinline__ void
copy_piece(const Fixed *fixed, const Walk<T, kRowTiles> &walk, int rows, int hidden, uint32_t slot) {
    const int lane = threadIdx.x % 32;
    if (walk.column < hidden) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = lane / 8 + 4 * i, output = walk.tile * kPieceRows + row;
            if (output < rows)
                cp_async16(slot + row * 128 + swapped(row, lane % 8) * 16,
                           static_cast<const char *>(fixed->row[output]) + walk.column * sizeof(T) + lane % 8 * 16,
                           true);
        }
    }
    cp_async_commit();
}

/* ---- the kernel ------------------------------------------------------------------------------------------------- */

/* kRowTiles: tiles of 16 rows of the weight. */
template <typename T, int kTokens, int kRowTiles> __global__ void __launch_bounds__(kThreads, 2)
    rms_norm_qkv_decode_kernel(const __grid_constant__ mv_task task, const __grid_constant__ Split split) {
    using Product = ::Product<T, kTokens>;
    extern __shared__ __align__(128) char shared[];
    Fixed *const fixed = reinterpret_cast<Fixed *>(shared);
    const int block = blockIdx.x, warp = threadIdx.x / 32;
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
    Walk<T, kRowTiles> asked = {0, warp * kPieceColumns<T>};
    const auto fill = [&](int first, int end) {
#pragma unroll 1
        for (int slot = first; slot < end; slot++) {
            copy_piece(fixed, asked, rows, hidden, shared_address(ring) + slot * kPieceBytes);
            asked.next();
        }
    };
    fill(0, split.early);
    if (threadIdx.x < rows) fixed->bias[threadIdx.x] = load_bias<T>(task, find_output(task, first_row + threadIdx.x));
    const Product product(shared + split.y, task);
    griddepcontrol_wait();

    constexpr int kLanes = kTokens == 16 ? 16 : 32;
    if (kTokens < 16 && split.direct) {
        read_tokens<T, kLanes, true>(task, split, share, fixed);
        fill(split.early, split.slots);
    } else {
        copy_tokens<T>(task, split, share);
        fill(split.early, split.slots);
        cp_async_wait_all_but(split.slots - split.early);
        read_tokens<T, kLanes, false>(task, split, share, fixed);
    }
    if (split.resident)
        cp_async_wait<0>();
    else
        cp_async_wait_all_but(split.slots - 1); /* and for the norm weights, which were asked for before */
    __syncthreads();
    normalise_tokens<T>(task, split, share, fixed, norm_weight);
    __syncthreads();

    typename Product::Sums sums[kRowTiles];
    const char *slot = ring;
    if (split.resident) {
        for (int k = warp * kPieceColumns<T>; k < hidden; k += kStep<T>) {
            const typename Product::Columns y = product.columns(k);
#pragma unroll
            for (int m = 0; m < kRowTiles; m++, slot += kPieceBytes) Product::multiply(Product::read(slot), y, sums[m]);
        }
    } else {
        typename Product::Piece piece = Product::read(slot);
        const char *const end = ring + split.slots * kPieceBytes;
#pragma unroll 1
        for (int k = warp * kPieceColumns<T>; k < hidden; k += kStep<T>) {
            const typename Product::Columns y = product.columns(k);
#pragma unroll
            for (int m = 0; m < kRowTiles; m++) {
                Product::multiply(piece, y, sums[m]);
                __syncwarp(); /* all lanes have read this piece: its slot is free */
                copy_piece(fixed, asked, rows, hidden, shared_address(slot));
                asked.next();
                slot = slot + kPieceBytes == end ? ring : slot + kPieceBytes;
                cp_async_wait_all_but(split.slots - 1);
                __syncwarp();
                piece = Product::read(slot);
            }
        }
    }

    /* The warps' parts of each sum meet where their slots were, token by token; 4 words more than a multiple of 16 keep
     * the lanes' writes out of each other's banks. */
    constexpr int kPitch = kRowTiles * kPieceRows + 4;
    static_assert(kTokens * kPitch * 4 <= kMinSlots * kPieceBytes, "the parts fit");
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kRowTiles; m++)
        Product::store(reinterpret_cast<float *>(ring) + m * kPieceRows, kPitch, sums[m]);
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

int y_bytes(const mv_task *task) {
    return static_cast<int>(task->tokens * task->hidden) * static_cast<int>(mv_dtype_bytes(task->dtype));
}

/* As many slots per warp as a block of this size has room for. */
int slots_of(const mv_task *task, int block_bytes) {
    const int room = block_bytes - kRing - norm_weight_bytes(task) - y_bytes(task),
              slots = room / (kWarps * kPieceBytes);
    return slots < kMinSlots ? 0 : min(slots, block_bytes == kHalfBytes ? 6 : kMaxSlots);
}

/* Two blocks share an SM, where there is room for both, up to so many weights of each. */
int block_bytes_of(const mv_task *task) {
    constexpr int64_t kFewBytes = 150 << 10; /* 95 KB run faster in halves, 190 KB in a whole */
    const int64_t weight_bytes = task->outputs * task->hidden * static_cast<int64_t>(mv_dtype_bytes(task->dtype));
    return weight_bytes <= kFewBytes * task->sm_count && slots_of(task, kHalfBytes) > 0 ? kHalfBytes : kWholeBytes;
}

/* The more tokens, the later they come, and the fewer weights may be asked for before them. */
int early_slots(const mv_task *task, int slots) {
    constexpr int kEarlyBytes = 144 << 10;
    const int early = (kEarlyBytes - y_bytes(task) * 5 / 4) / (kWarps * kPieceBytes);
    return min(max(early, 1), slots - 1);
}

template <typename T, int kTokens, int kRowTiles>
mv_status launch_rows(const mv_task *task, Split split, int blocks, mv_error *error) {
    split.resident = (task->hidden + kStep<T> - 1) / kStep<T> * kRowTiles <= split.slots;
    split.early = split.resident ? split.slots : early_slots(task, split.slots);
    const Grid grid = {static_cast<unsigned>(blocks), kThreads, static_cast<size_t>(block_bytes_of(task))};
    return launch<rms_norm_qkv_decode_kernel<T, kTokens, kRowTiles>>(task, grid, error, *task, split);
}

/* More rows than the blocks can take at once are several launches. */
template <typename T, int kTokens> mv_status launch_decode(const mv_task *task, mv_error *error) {
    const int outputs = static_cast<int>(task->outputs), tokens = static_cast<int>(task->tokens);
    const int blocks = outputs < task->sm_count ? outputs : task->sm_count;
    const int64_t most = static_cast<int64_t>(blocks) * kMaxRowTiles * kPieceRows, parts = (outputs + most - 1) / most;
    Split split = {};
    split.log_threads = tokens == 1 ? 8 : tokens == 2 ? 7 : tokens <= 4 ? 6 : tokens <= 8 ? 5 : 4;
    split.direct = tokens <= 2 && task->hidden <= kBatch * (Packet<T>::size << split.log_threads);
    split.slots = slots_of(task, block_bytes_of(task));
    split.norm_weight = kRing + split.slots * kWarps * kPieceBytes;
    split.y = split.norm_weight + norm_weight_bytes(task);
    split.mean_scale = mean_scale<T>(*task);
    split.in_pairs =
        task->rounding == MV_ROUNDING_HF && task->norm_weight_dtype == task->dtype && task->weight_offset == 0;
    mv_status status = MV_OK;
    for (int64_t part = 0; part < parts && status == MV_OK; part++) {
        split.first_output = static_cast<int>(outputs * part / parts);
        const int count = static_cast<int>(outputs * (part + 1) / parts) - split.first_output;
        split.rows_per_block = count / blocks;
        split.more = count % blocks;
        switch ((split.rows_per_block + (split.more > 0) + kPieceRows - 1) / kPieceRows) {
        case 1: status = launch_rows<T, kTokens, 1>(task, split, blocks, error); break;
        case 2: status = launch_rows<T, kTokens, 2>(task, split, blocks, error); break;
        case 3: status = launch_rows<T, kTokens, 3>(task, split, blocks, error); break;
        case 4: status = launch_rows<T, kTokens, 4>(task, split, blocks, error); break;
        default: status = launch_rows<T, kTokens, kMaxRowTiles>(task, split, blocks, error); break;
        }
    }
    return status;
}

template <typename T> mv_status decode(const mv_task *task, mv_error *error) {
    return task->tokens <= 8 ? launch_decode<T, 8>(task, error) : launch_decode<T, 16>(task, error);
}

} // namespace

extern "C" const char *mv_decode_sm90a_fits(const mv_task *task) {
    const bool narrow = task->dtype != MV_F32;
    const int per_packet = narrow ? 8 : 4;
    if (task->compute_capability != 90) return "it is for sm_90";
    if (task->weight_dtype != task->dtype) return "it takes weights of x's dtype";
    if (task->tokens > (narrow ? kMaxTokens : kMaxTokensFloat32))
        return narrow ? "it takes up to 16 tokens" : "it takes up to 4 tokens of float32";
    if (task->block[0].col_stride != 1) return "it needs weights that are contiguous along the hidden size";
    if (task->hidden % (8 * per_packet) != 0) return "the rows of the weight are no multiple of 128 bytes";
    if (task->outputs > 1 << 24) return "it counts in 32 bits: there are too many outputs";
    if (task->hidden > 1 << 16 || slots_of(task, kWholeBytes) == 0) return "the tokens do not fit in shared memory";
    if (task->tokens > task->inner) return "the rows of x have two strides";
    if (!(narrow ? norm_rows_aligned<__half>(task) : norm_rows_aligned<float>(task)) ||
        !is_aligned16(task->norm_weight))
        return "the rows of x, or the norm weight, are not 16-byte aligned";
    for (const mv_block &block : task->block)
        if (block.outputs && (!is_aligned16(block.weight) || block.row_stride % per_packet != 0))
            return "the rows of the weight are not 16-byte aligned";
    return nullptr;
}

extern "C" mv_status mv_rms_norm_qkv_f32_decode_sm90a(const mv_task *task, mv_error *error) {
    switch (task->tokens) {
    case 1: return launch_decode<float, 1>(task, error);
    case 2: return launch_decode<float, 2>(task, error);
    default: return launch_decode<float, 4>(task, error);
    }
}
extern "C" mv_status mv_rms_norm_qkv_f16_decode_sm90a(const mv_task *task, mv_error *error) {
    return decode<__half>(task, error);
}
extern "C" mv_status mv_rms_norm_qkv_bf16_decode_sm90a(const mv_task *task, mv_error *error) {
    return decode<__nv_bfloat16>(task, error);
}

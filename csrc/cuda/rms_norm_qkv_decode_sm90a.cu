/* rms_norm_qkv_decode_sm90a.cu: RMSNorm and the projection for few tokens on Hopper, at the speed of memory.
 *
 * A block, of which an SM has one, takes an even share of the rows of the weight, in tiles of 16. Its warps share the
 * columns: each copies pieces of 16 rows x 128 bytes into slots of its own in shared memory and multiplies those that
 * have arrived by the tokens: 16-bit values on the tensor cores, the weight being the wide operand, float32 on the CUDA
 * cores. A block lets the next kernel of the stream start as soon as it is resident itself. With static_weights nothing
 * that the weights need depends on the kernel before, so the block asks for them at once. Without, the kernel before
 * may still write them: the block has L2 bring them, and all else comes after the wait. Where its share is small, a
 * block takes a little less than half of an SM's shared memory: that of the next call fills its slots while this one
 * still computes, and memory is never idle. (A third does not fit, so no SM gets two blocks of one call.) Where it is
 * larger, a block takes all of it: then it matters more how many weights can be on their way while the tokens are
 * normalised.
 *
 * Memory answers in order, and tokens that are asked for after 200 KB of weights come late; so a block that is not done
 * with its weights anyway fills its last slots after it has asked for the tokens. They are normalised into shared
 * memory. What a small shape costs is the latency of what follows the wait for the previous kernel, so that is kept
 * short (docs/speed/few_tokens.md): addresses are computed before it, few tokens stay in registers until they are
 * normalised, where all pieces of a warp have a slot it waits for them once, and where the weights are so small that
 * blocks can hold more rows of them, each block has a group of the tokens only.
 *
 * Without a norm x is copied to where y would be, and nothing else happens to it; the addends of a thread's outputs are
 * on their way, to its registers, while it multiplies.
 *
 * How the rows are split is up to the launch. The head-aligned split (decode_heads) gives each head of 128 outputs to a
 * cluster of 2, 4 or 8 blocks, for what needs a whole head: its norm, RoPE, the write to the cache of K and V. Heads
 * seldom fill all SMs, so that runs only where it is asked for by name.
 *
 * Sums are float32: of each warp's columns in order of k, then over the warps in a fixed order. Where a row lies does
 * not matter: both splits give the same bits, unless the even one has groups of tokens. */
#include "cuda.h"
#include "decode_split.cuh"
#include "h100.cuh"
#include "launch.cuh"
#include "linear_epilogue.cuh"
#include "norm_plan.cuh"

namespace {

template <typename T> constexpr int kStep = kWarps *kPieceColumns<T>; /* columns that the warps multiply at a time */

/* ---- the weights ------------------------------------------------------------------------------------------------ */

/* Starts to copy the norm weights, each thread a part: a group of copies. */
__device__ __forceinline__ void copy_norm_weight(const mv_task &task, uint32_t to) {
    const int bytes = static_cast<int>(task.hidden) * (task.norm.weight_dtype == MV_F32 ? 4 : 2);
    for (int at = threadIdx.x * 16; at < bytes; at += kThreads * 16)
        cp_async16(to + at, static_cast<const char *>(task.norm.weight) + at, true);
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
copy_piece(const void *const *row_at, const Walk<T, kRowTiles> &walk, int rows, int hidden, uint32_t slot) {
    const int lane = threadIdx.x % 32;
    if (walk.column < hidden) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = lane / 8 + 4 * i, output = walk.tile * kPieceRows + row;
            if (output < rows)
                cp_async16(slot + row * 128 + swapped(row, lane % 8) * 16,
                           static_cast<const char *>(row_at[output]) + walk.column * sizeof(T) + lane % 8 * 16, true);
        }
    }
    cp_async_commit();
}

/* ---- the kernel ------------------------------------------------------------------------------------------------- */

/* What the weights multiply. kLate: "fp32", y is x times the norm weights in two parts, and the row factors join the
 * sums, so that nobody waits for them before the product. kPlain: x; only then there may be addends. */
enum class Form { kNorm, kLate, kPlain };

/* kRowTiles: tiles of 16 rows of the weight. */
template <typename T, int kTokens, int kRowTiles, Form kForm> __global__ void __launch_bounds__(kThreads, 2)
    rms_norm_qkv_decode_kernel(const __grid_constant__ mv_task task, const __grid_constant__ Split split) {
    constexpr bool kLate = kForm == Form::kLate, kPlain = kForm == Form::kPlain;
    using Product = ::Product<T, kTokens>;
    using Fixed = ::Fixed<kTokens>;
    extern __shared__ __align__(128) char shared[];
    Fixed *const fixed = reinterpret_cast<Fixed *>(shared);
    const int block = blockIdx.x >> split.log_groups, group = blockIdx.x & ((1 << split.log_groups) - 1);
    const int warp = threadIdx.x / 32;
    const int first_row = split.first_output + block * split.rows_per_block + min(block, split.more) * split.unit;
    const int rows = split.rows_per_block + (block < split.more) * split.unit;
    const int hidden = static_cast<int>(task.hidden);
    char *const ring = shared + kRing<kTokens> + warp * split.slots * kPieceBytes;
    const char *const norm_weight = shared + split.norm_weight;

    /* What does not depend on the kernel before. */
    griddepcontrol_launch();
    if (threadIdx.x < rows) {
        const T *const row = weight_row<T>(task, find_output(task, first_row + threadIdx.x));
        if (!task.static_weights)
            prefetch_l2(row, min(hidden * static_cast<int>(sizeof(T)), split.early * kWarps * kPieceBytes / rows));
        fixed->row[threadIdx.x] = row;
    }
    if (!kPlain && threadIdx.x < kTokens * kWarps) (&fixed->squares[0][0])[threadIdx.x] = 0;
    if (!task.static_weights) {
        if (!kPlain) prefetch_norm_weight(task);
        griddepcontrol_wait();
    }
    __syncthreads();
    const Share<T, kLate> share(task, split, group, shared);
    if (!kPlain) copy_norm_weight(task, shared_address(norm_weight));
    Walk<T, kRowTiles> asked = {0, warp * kPieceColumns<T>};
    const auto fill = [&](int first, int end) {
#pragma unroll 1
        for (int slot = first; slot < end; slot++) {
            copy_piece(fixed->row, asked, rows, hidden, shared_address(ring) + slot * kPieceBytes);
            asked.next();
        }
    };
    fill(0, split.early);
    if (threadIdx.x < rows) fixed->bias[threadIdx.x] = load_bias<T>(task, find_output(task, first_row + threadIdx.x));
    const Product product(shared + split.y, kLate ? 2 * share.tokens : share.tokens, hidden);
    if (kLate) {
        cp_async_wait_all_but(split.early); /* for the norm weights */
        __syncthreads();
    }
    griddepcontrol_wait();

    /* A thread's outputs are those of one row, of some tokens. */
    constexpr int kRowSlots = kRowTiles == 1 ? 16 : kRowTiles == 2 ? 32 : kRowTiles <= 4 ? 64 : 128;
    constexpr int kAtOnce = kThreads / kRowSlots, kOwn = (kTokens + kAtOnce - 1) / kAtOnce;
    const int row = threadIdx.x % kRowSlots;
    float addend[kOwn] = {};
    const auto load_addends = [&] {
        if (!task.linear.addend.data || row >= rows) return;
#pragma unroll
        for (int i = 0; i < kOwn; i++) {
            const int token = static_cast<int>(threadIdx.x) / kRowSlots + i * kAtOnce;
            if (token < share.tokens)
                addend[i] =
                    to_float(__ldcg(token_row<const T>(task.linear.addend, share.first + token) + first_row + row));
        }
    };

    constexpr int kLanes = kTokens == 16 ? 16 : 32;
    const auto await_weights = [&] {
        if (split.resident)
            cp_async_wait<0>();
        else
            cp_async_wait_all_but(split.slots - 1); /* and for the norm weights, which were asked for before */
        __syncthreads();
    };
    const auto hold_tokens = [&](auto held) {
        held.load();
        if (!held.few) fill(split.early, split.slots); /* few are there soon, unless weights are in their way */
        held.read(norm_weight);
        if (held.few) fill(split.early, split.slots);
        if (!kLate) keep_squares<T, kLanes>(fixed->squares, share, hidden, held.squares);
        await_weights();
        if (kLate)
            keep_squares<T, kLanes>(fixed->squares, share, hidden, held.squares);
        else if (split.in_pairs)
            held.normalise(fixed->squares, norm_weight, true);
        else
            held.normalise(fixed->squares, norm_weight, false);
    };
    if constexpr (kPlain) {
        copy_tokens<T>(task, split, share);
        load_addends();
        fill(split.early, split.slots);
        cp_async_wait_all_but(split.slots - split.early);
        await_weights();
    } else if constexpr (kLate) {
        hold_tokens(Held<T, kLate, kFewHeld>{task, split, share});
    } else {
        if (kTokens <= kMaxHeldTokens && split.held <= kFewHeld) {
            hold_tokens(Held<T, kLate, kFewHeld>{task, split, share});
        } else if (kTokens == kMaxHeldTokens && split.held <= kMostHeld) {
            hold_tokens(Held<T, kLate, kMostHeld>{task, split, share});
        } else {
            copy_tokens<T>(task, split, share);
            fill(split.early, split.slots);
            cp_async_wait_all_but(split.slots - split.early);
            read_tokens<T, kLanes>(task, split, share, fixed->squares);
            await_weights();
            normalise_tokens<T>(task, split, share, fixed->squares, norm_weight);
        }
        __syncthreads();
    }

    typename Product::Sums sums[kRowTiles];
    const char *slot = ring;
    const auto read_piece = [&](int tile) {
        const bool whole = kRowTiles == 1 || tile < kRowTiles - 1;
        return Product::read(slot, whole ? kPieceRows : rows - tile * kPieceRows);
    };
    if (split.resident) {
        for (int k = warp * kPieceColumns<T>; k < hidden; k += kStep<T>) {
            const typename Product::Columns y = product.columns(k);
#pragma unroll
            for (int m = 0; m < kRowTiles; m++, slot += kPieceBytes) Product::multiply(read_piece(m), y, sums[m]);
        }
    } else {
        typename Product::Piece piece = read_piece(0);
        const char *const end = ring + split.slots * kPieceBytes;
#pragma unroll 1
        for (int k = warp * kPieceColumns<T>; k < hidden; k += kStep<T>) {
            const typename Product::Columns y = product.columns(k);
#pragma unroll
            for (int m = 0; m < kRowTiles; m++) {
                Product::multiply(piece, y, sums[m]);
                __syncwarp(); /* all lanes have read this piece: its slot is free */
                copy_piece(fixed->row, asked, rows, hidden, shared_address(slot));
                asked.next();
                slot = slot + kPieceBytes == end ? ring : slot + kPieceBytes;
                cp_async_wait_all_but(split.slots - 1);
                __syncwarp();
                piece = read_piece((m + 1) % kRowTiles);
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
        Product::template store<kLate>(reinterpret_cast<float *>(ring) + m * kPieceRows, kPitch, sums[m]);
    __syncthreads();
    const auto total_of = [&](int token, int row) {
        const char *parts = shared + kRing<kTokens> + (token * kPitch + row) * 4;
        float total = 0;
#pragma unroll
        for (int w = 0; w < kWarps; w++)
            total += *reinterpret_cast<const float *>(parts + w * split.slots * kPieceBytes);
        return total;
    };
    if (row >= rows) return;
    const int first_token = threadIdx.x / kRowSlots;
    const auto place_of = [&](int token) { return token_row<T>(task.out, share.first + token) + first_row + row; };
    if constexpr (kPlain) {
#pragma unroll
        for (int i = 0; i < kOwn; i++) {
            const int token = first_token + i * kAtOnce;
            if (token < share.tokens)
                *place_of(token) = finish_output<T>(task, total_of(token, row), fixed->bias[row], addend[i]);
        }
    } else {
        if (task.linear.gated && row % 2 != 0) return; /* the thread of the gate has up, too */
#pragma unroll 1
        for (int token = first_token; token < share.tokens; token += kAtOnce) {
            const float factor = kLate ? token_factor<T>(task, split, fixed->squares[token]) : 1.0f;
            const float sum = total_of(token, row) * factor;
            if (!task.linear.gated) {
                *place_of(token) = finish_output<T>(sum, fixed->bias[row]);
                continue;
            }
            const float gate = sum + fixed->bias[row], up = total_of(token, row + 1) * factor + fixed->bias[row + 1];
            token_row<T>(task.out, share.first + token)[(first_row + row) / 2] = finish_gated<T>(task, gate, up);
        }
    }
}

/* ---- launchers ------------------------------------------------------------------------------------------------ */

template <typename T, int kTokens, int kRowTiles, Form kForm>
mv_status launch_rows(const mv_task *task, Split split, const Groups &groups, const Part &part, mv_error *error) {
    split.resident = (task->hidden + kStep<T> - 1) / kStep<T> * kRowTiles <= split.slots;
    split.early = split.resident ? split.slots : early_slots(task, groups.y_rows, split.slots);
    const Grid grid = {static_cast<unsigned>(part.blocks) << groups.log_groups, kThreads,
                       static_cast<size_t>(block_bytes_of(task, groups)), part.cluster};
    return launch<rms_norm_qkv_decode_kernel<T, kTokens, kRowTiles, kForm>>(task, grid, error, *task, split);
}

template <typename T, int kTokens, Form kForm>
mv_status launch_split(const mv_task *task, const Groups &groups, mv_error *error) {
    const int tokens = groups.tokens;
    const int64_t parts = parts_of(task, groups);
    Split split = {};
    split.log_groups = groups.log_groups;
    split.group_tokens = tokens;
    split.log_threads = tokens == 1 ? 8 : tokens == 2 ? 7 : tokens <= 4 ? 6 : tokens <= 8 ? 5 : 4;
    const int step = Packet<T>::size << split.log_threads;
    split.held = (static_cast<int>(task->hidden) + step - 1) / step;
    split.slots = slots_of(task, groups.y_rows, block_bytes_of(task, groups));
    split.norm_weight = kRing<kTokens> + split.slots * kWarps * kPieceBytes;
    split.y = split.norm_weight + norm_weight_bytes(task);
    split.mean_scale = mean_scale<T>(*task);
    split.in_pairs =
        mv_norm_rounds_twice(task->rounding) && task->norm.weight_dtype == task->dtype && task->norm.weight_offset == 0;
    mv_status status = MV_OK;
    for (int64_t i = 0; i < parts && status == MV_OK; i++) {
        const Part part = part_of(task, groups, i, parts);
        split.first_output = part.first_output;
        split.unit = unit_of(task);
        split.rows_per_block = part.outputs / split.unit / part.blocks * split.unit;
        split.more = part.outputs / split.unit % part.blocks;
        switch ((split.rows_per_block + (split.more > 0) * split.unit + kPieceRows - 1) / kPieceRows) {
        case 1: status = launch_rows<T, kTokens, 1, kForm>(task, split, groups, part, error); break;
        case 2: status = launch_rows<T, kTokens, 2, kForm>(task, split, groups, part, error); break;
        case 3: status = launch_rows<T, kTokens, 3, kForm>(task, split, groups, part, error); break;
        case 4: status = launch_rows<T, kTokens, 4, kForm>(task, split, groups, part, error); break;
        default: status = launch_rows<T, kTokens, kMaxRowTiles, kForm>(task, split, groups, part, error); break;
        }
    }
    return status;
}

template <typename T, int kTokens> mv_status launch_decode(const mv_task *task, const Groups &groups, mv_error *error) {
    return task->linear.plain_x ? launch_split<T, kTokens, Form::kPlain>(task, groups, error)
                                : launch_split<T, kTokens, Form::kNorm>(task, groups, error);
}

template <typename T> mv_status decode(const mv_task *task, const Groups &groups, mv_error *error) {
    if constexpr (sizeof(T) == 4) {
        switch (groups.tokens) {
        case 1: return launch_decode<T, 1>(task, groups, error);
        case 2: return launch_decode<T, 2>(task, groups, error);
        default: return launch_decode<T, 4>(task, groups, error);
        }
    } else {
        if constexpr (Dtype<T>::value == MV_BF16)
            if (groups.late) return launch_split<T, 8, Form::kLate>(task, groups, error);
        return groups.tokens <= 8 ? launch_decode<T, 8>(task, groups, error)
                                  : launch_decode<T, 16>(task, groups, error);
    }
}

/* Why a split cannot serve a task; `too_many` is said of tokens. */
const char *why_not(const mv_task *task, const Groups &groups, const char *too_many) {
    const bool narrow = task->dtype != MV_F32;
    const int per_packet = narrow ? 8 : 4;
    if (task->linear.weight_dtype != task->dtype) return "it takes weights of x's dtype";
    if (task->linear.block[0].col_stride != 1) return "it needs weights that are contiguous along the hidden size";
    if (task->hidden % (8 * per_packet) != 0) return "the rows of the weight are no multiple of 128 bytes";
    if (task->linear.outputs > 1 << 24) return "it counts in 32 bits: there are too many outputs";
    if (task->hidden > 1 << 16) return "the tokens do not fit in shared memory";
    if (groups.tokens == 0) return narrow ? too_many : "it takes up to 4 tokens of float32";
    if (slots_of(task, groups.y_rows, kWholeBytes) == 0) return "the tokens do not fit in shared memory";
    if (task->tokens > task->inner) return "the rows of x have two strides";
    if (!(narrow ? norm_rows_aligned<__half>(task) : norm_rows_aligned<float>(task)) ||
        !is_aligned16(task->norm.weight))
        return "the rows of x, or the norm weight, are not 16-byte aligned";
    for (const mv_block &block : task->linear.block)
        if (block.outputs && (!is_aligned16(block.weight) || block.row_stride % per_packet != 0))
            return "the rows of the weight are not 16-byte aligned";
    return nullptr;
}

/* Are hidden and outputs small enough for the arithmetic of choose_groups and choose_heads? */
bool counts_fit(const mv_task *task) { return task->hidden <= 1 << 16 && task->linear.outputs <= 1 << 24; }

/* What the tokens of a block take of its shared memory is missed where weights should be on their way
 * (docs/speed/few_tokens.md). */
double missed_us(const mv_task *task, const Groups &groups) {
    const double bytes = y_bytes(task, groups.tokens);
    return block_bytes_of(task, groups) == kHalfBytes ? (bytes - 25e3) / 9e3 : (bytes - 35e3) / 18e3;
}

} // namespace

/* ---- the rows -------------------------------------------------------------------------------------------------- */

extern "C" {
const char *mv_decode_sm90a_decide(const mv_task *task, double below, mv_decision *decision) {
    const Groups groups = counts_fit(task) ? choose_groups(task) : Groups{};
    const double missed = groups.tokens > 0 ? missed_us(task, groups) : 0;
    if (!mv_at_price(decision, h100::decode_sm90a_us(task, missed), below)) return mv_too_dear;
    keep_cut(decision, groups);
    return why_not(task, groups, "it takes up to 16 tokens, or 64 where the weights are small");
}

const char *mv_decode_heads_sm90a_decide(const mv_task *task, double below, mv_decision *decision) {
    if (!mv_at_price(decision, HUGE_VAL, below)) return mv_too_dear; /* only by name */
    if (const char *reason = norm_linear_why_not(task)) return reason;
    const Groups groups = counts_fit(task) ? choose_heads(task) : Groups{};
    keep_cut(decision, groups);
    if (const char *reason = why_not(task, groups, "it takes up to 16 tokens")) return reason;
    for (const mv_block &block : task->linear.block)
        if (block.outputs % kHeadOutputs != 0)
            return "the outputs of q, k or v are no multiple of 128, the size of a head";
    return nullptr;
}

#define MV_ROWS(name)                                                                                                  \
    mv_status mv_rms_norm_qkv_f32_##name(const mv_task *task, const mv_decision *decision, mv_error *error) {          \
        return decode<float>(task, cut_of<Groups>(decision), error);                                                   \
    }                                                                                                                  \
    mv_status mv_rms_norm_qkv_f16_##name(const mv_task *task, const mv_decision *decision, mv_error *error) {          \
        return decode<__half>(task, cut_of<Groups>(decision), error);                                                  \
    }                                                                                                                  \
    mv_status mv_rms_norm_qkv_bf16_##name(const mv_task *task, const mv_decision *decision, mv_error *error) {         \
        return decode<__nv_bfloat16>(task, cut_of<Groups>(decision), error);                                           \
    }
MV_ROWS(decode_sm90a)
MV_ROWS(decode_heads_sm90a)
}

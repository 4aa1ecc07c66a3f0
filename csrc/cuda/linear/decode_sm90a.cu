/* decode_sm90a.cu: RMSNorm and the projection for few tokens on Hopper, at the speed of memory.
 *
 * A block, of which an SM has one, takes an even share of the rows of the weight, in tiles of 16, and multiplies up to
 * five of them in a pass. Its warps share the columns: each copies 128 bytes of every row of the pass into a slot of
 * its own in shared memory, and multiplies what has arrived by the tokens: 16-bit values on the tensor cores, the
 * weight being the wide operand, float32 on the CUDA cores. Copies run ahead into the next pass, so memory does not
 * wait while the warps add up the sums of one. A warp waits once for a slot, at a barrier that its copies report to:
 * what it does between two slots decides how much a block can take from memory. A block lets the next kernel of the
 * stream start as soon as it is resident itself. With static_weights nothing that the weights need depends on the
 * kernel before, so the block asks for them at once. Without, the kernel before may still write them: the block has L2
 * bring them, and all else comes after the wait. Where its share is small, a block takes a little less than half of an
 * SM's shared memory: that of the next call fills its slots while this one still computes, and memory is never idle. (A
 * third does not fit, so no SM gets two blocks of one call.) Where it is larger, a block takes all of it: then it
 * matters more how many weights can be on their way while the tokens are normalised.
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
#include "cuda/arch/launch.cuh"
#include "cuda/arch/mbarrier.cuh"
#include "cuda/cuda.h"
#include "cuda/linear/decode_split.cuh"
#include "cuda/linear/epilogue.cuh"
#include "cuda/linear/plan.cuh"

namespace {

template <typename T> constexpr int kStep = kWarps *kPieceColumns<T>; /* columns that the warps multiply at a time */

/* ---- the weights ------------------------------------------------------------------------------------------------ */

/* Starts to copy the norm weights, each thread a part: a group of copies. */
__device__ __forceinline__ void copy_norm_weight(const mv_task &task, uint32_t to) {
    const int bytes = static_cast<int>(task.hidden) * (task.norm.weight_dtype == MV_F32 ? 4 : 2);
#pragma unroll 1
    for (int at = threadIdx.x * 16; at < bytes; at += kThreads * 16)
        cp_async16(to + at, static_cast<const char *>(task.norm.weight) + at, true);
    cp_async_commit();
}

/* Where a warp's next copies come from: the columns of a step, of the block's rows from `row` on. */
struct Asked {
    int column, row;
    template <typename T> __device__ __forceinline__ void next(int hidden, int pass_rows) {
        column += kStep<T>;
        if (column < hidden) return;
        column = static_cast<int>(threadIdx.x) / 32 * kPieceColumns<T>;
        row += pass_rows;
    }
};

/* Starts to copy a step of a warp, if there is one: 128 bytes of each row of the pass. They report to the barrier. */
template <typename T, int kRowTiles> __device__ __forceinline__ void copy_step(const void *const *row_at, Asked asked,
                                                                               int rows, int pass_rows, uint32_t slot,
                                                                               uint32_t barrier, uint64_t policy) {
    constexpr int kAtOnce = 8; /* of a lane */
    const int lane = threadIdx.x % 32, count = min(rows - asked.row, pass_rows);
    if (count <= 0) return;
    const int64_t offset = asked.column * static_cast<int>(sizeof(T)) + lane % 8 * 16;
    slot += lane / 8 * 128 + swapped(lane / 8, lane % 8) * 16;
#pragma unroll
    for (int first = 0; first < kRowTiles * 4; first += kAtOnce) {
        const char *from[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce && first + i < kRowTiles * 4; i++) {
            const int row = lane / 8 + (first + i) * 4;
            from[i] = row < count ? static_cast<const char *>(row_at[asked.row + row]) : nullptr;
        }
#pragma unroll
        for (int i = 0; i < kAtOnce && first + i < kRowTiles * 4; i++)
            if (from[i]) cp_async16_once(slot + (first + i) * 4 * 128, from[i] + offset, policy);
    }
    cp_async_arrive(barrier);
}

/* ---- the kernel ------------------------------------------------------------------------------------------------- */

/* What the weights multiply. kLate: "fp32", y is x times the norm weights in two parts, and the row factors join the
 * sums, so that nobody waits for them before the product. kPlain: x; only then there may be addends. */
enum class DecodeForm { kNorm, kLate, kPlain };

/* kRowTiles: tiles of 16 rows of the weight. */
template <typename T, int kTokens, int kRowTiles, DecodeForm kForm> __global__ void __launch_bounds__(kThreads, 2)
    decode_sm90a_kernel(const __grid_constant__ mv_task task, const __grid_constant__ DecodeSplit split) {
    constexpr bool kLate = kForm == DecodeForm::kLate, kPlain = kForm == DecodeForm::kPlain;
    constexpr int kMostChains = kForm == DecodeForm::kNorm ? 2 : 4; /* a norm takes the registers of more */
    using Product = ::PieceProduct<T, kTokens, kMostChains>;
    using DecodeFixed = ::DecodeFixed<kTokens>;
    extern __shared__ __align__(128) char shared[];
    DecodeFixed *const fixed = reinterpret_cast<DecodeFixed *>(shared);
    const void **const row_at = reinterpret_cast<const void **>(fixed + 1);
    const int block = blockIdx.x >> split.log_groups, group = blockIdx.x & ((1 << split.log_groups) - 1);
    const int warp = threadIdx.x / 32;
    int first_row = split.first_output + block * split.rows_per_block + min(block, split.more) * split.unit;
    int rows = split.rows_per_block + (block < split.more) * split.unit;
    compute_now(first_row);
    compute_now(rows);
    const int hidden = static_cast<int>(task.hidden);
    float *const bias = reinterpret_cast<float *>(row_at + rows);
    char *const ring = shared + split.ring + warp * split.slots * split.slot_bytes;
    const uint32_t full = shared_address(fixed->full[warp]); /* a slot's copies are there */
    const char *const norm_weight = shared + split.norm_weight;

    /* What does not depend on the kernel before. */
    griddepcontrol_launch();
#pragma unroll 1
    for (int i = threadIdx.x; i < rows; i += kThreads) {
        const T *const row = weight_row<T>(task, find_output(task, first_row + i));
        if (!task.static_weights && i < split.pass_rows)
            prefetch_l2(row, min(hidden, split.early * kStep<T>) * static_cast<int>(sizeof(T)));
        row_at[i] = row;
    }
    if (!kPlain && threadIdx.x < kTokens * kWarps) (&fixed->squares[0][0])[threadIdx.x] = 0;
    if (threadIdx.x % 32 < split.slots) mbarrier_init(full + threadIdx.x % 32 * 8, 32);
    if (!task.static_weights) {
        if (!kPlain) prefetch_norm_weight(task);
        griddepcontrol_wait();
    }
    __syncthreads();
    const TokenShare<T, kLate> share(task, split, group, shared);
    if (!kPlain) copy_norm_weight(task, shared_address(norm_weight));
    const int first_column = warp * kPieceColumns<T>;
    int steps = max(hidden - first_column + kStep<T> - 1, 0) / kStep<T>; /* in which the warp multiplies a pass */
    compute_now(steps);
    T *out = token_row<T>(task.out, share.first);
    compute_now(out);
    Asked asked = {first_column, first_column < hidden ? 0 : rows};
    const uint64_t policy = l2_evict_first(); /* each weight is read once */
    const auto fill_slot = [&](int slot) {
        copy_step<T, kRowTiles>(row_at, asked, rows, split.pass_rows, shared_address(ring) + slot * split.slot_bytes,
                                full + slot * 8, policy);
        asked.next<T>(hidden, split.pass_rows);
    };
    const auto fill = [&](int first, int end) {
#pragma unroll 1
        for (int slot = first; slot < end; slot++) fill_slot(slot);
    };
    fill(0, split.early);
#pragma unroll 1
    for (int i = threadIdx.x; i < rows; i += kThreads) bias[i] = load_bias<T>(task, find_output(task, first_row + i));
    const Product product(shared + split.y, kLate ? 2 * share.tokens : share.tokens, hidden);
    if (kLate) {
        cp_async_wait<0>(); /* for the norm weights */
        __syncthreads();
    }
    /* A thread's outputs are those of one row, of some tokens. */
    constexpr int kRowSlots = kRowTiles == 1 ? 16 : kRowTiles == 2 ? 32 : kRowTiles <= 4 ? 64 : 128;
    constexpr int kAtOnce = kThreads / kRowSlots, kOwn = (kTokens + kAtOnce - 1) / kAtOnce;
    const int row = threadIdx.x % kRowSlots;
    float addend[kOwn] = {};
    const auto load_addends = [&](int base) {
        if (!task.linear.addend.data || base + row >= rows) return;
#pragma unroll
        for (int i = 0; i < kOwn; i++) {
            const int token = static_cast<int>(threadIdx.x) / kRowSlots + i * kAtOnce;
            if (token < share.tokens)
                addend[i] = to_float(
                    load_past_l1(token_row<const T>(task.linear.addend, share.first + token) + first_row + base + row));
        }
    };

    constexpr int kLanes = kTokens == 16 ? 16 : 32;
    const auto await_copies = [&] {
        /* The weights have mostly arrived by now. Asking each slot takes time all the same, which is hidden here, while
         * the tokens are still on their way. */
        if (split.resident)
#pragma unroll 1
            for (int slot = 0; slot < steps; slot++) mbarrier_wait(full + slot * 8, 0);
        cp_async_wait<0>(); /* of norm weights and tokens */
        __syncthreads();
    };
    const auto hold_tokens = [&](auto held) {
        held.load();
        if (!held.few) fill(split.early, split.slots); /* few are there soon, unless weights are in their way */
        held.read(norm_weight);
        if (held.few) fill(split.early, split.slots);
        if (!kLate) keep_squares<T, kLanes>(fixed->squares, share, hidden, held.squares);
        await_copies();
        if (kLate)
            keep_squares<T, kLanes>(fixed->squares, share, hidden, held.squares);
        else if (split.in_pairs)
            held.normalise(fixed->squares, norm_weight, true);
        else
            held.normalise(fixed->squares, norm_weight, false);
    };
    const auto take_tokens = [&] {
        if constexpr (kPlain) {
            copy_tokens<T>(task, split, share);
            load_addends(0);
            fill(split.early, split.slots);
            await_copies();
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
                cp_async_wait<0>();
                read_tokens<T, kLanes>(task, split, share, fixed->squares);
                await_copies();
                normalise_tokens<T>(task, split, share, fixed->squares, norm_weight);
            }
            __syncthreads();
        }
    };

    /* The warps' parts of each sum meet in shared memory, token by token: where the slots were if there is one pass.
     * 4 words more than a multiple of 16 keep the lanes' writes out of each other's banks. */
    constexpr int kPitch = kRowTiles * kPieceRows + 4;
    const int parts_stride = split.one_pass ? split.slots * split.slot_bytes : kTokens * kPitch * 4;
    char *const parts = shared + (split.one_pass ? split.ring : split.parts);

    /* Up to here nothing depends on the kernel before, and the weights are on their way. Where there is time until that
     * kernel is done, the product is rehearsed, of whatever is where the tokens will be: in a model the kernels in
     * between have driven these instructions out of the caches of the SM, and now they come back meanwhile. */
    bool counts = !split.rehearses;
#pragma unroll 1
    for (;; counts = true) {
        if (counts) {
            griddepcontrol_wait();
            take_tokens();
        }
        const char *const weights = counts ? ring : shared + split.y;
        const int slot_bytes = counts ? split.slot_bytes : 0, piece_bytes = counts ? kPieceBytes : 0;
        int slot = 0;
        uint32_t parity = 0;
#pragma unroll 1
        for (int base = 0; base < rows; base += split.pass_rows) {
            typename Product::Sums sums[kRowTiles];
            if (kPlain && base > 0) load_addends(base);
            const auto multiply_step = [&](int k, int slot) {
                const typename Product::Columns y = product.columns(k);
#pragma unroll
                for (int m = 0; m < kRowTiles; m++) {
                    const bool whole = kRowTiles > 1 && m < kRowTiles - 1;
                    Product::multiply(Product::read(weights + slot * slot_bytes + m * piece_bytes,
                                                    whole ? kPieceRows : split.pass_rows - m * kPieceRows),
                                      y, sums[m]);
                }
            };
            if (split.resident) {
#pragma unroll 2
                for (int i = 0; i < steps; i++) multiply_step(first_column + i * kStep<T>, i);
            } else {
#pragma unroll 1
                for (int k = first_column; k < hidden; k += kStep<T>) {
                    mbarrier_wait(full + slot * 8, parity);
                    multiply_step(k, slot);
                    __syncwarp(); /* all lanes have read the slot: it is free */
                    fill_slot(slot);
                    if (++slot == split.slots) slot = 0, parity ^= 1;
                }
            }

            if (!counts) break;
            if (base > 0) __syncthreads(); /* the parts of the pass before have been read */
#pragma unroll
            for (int m = 0; m < kRowTiles; m++)
                Product::template store<kLate>(reinterpret_cast<float *>(parts + warp * parts_stride) + m * kPieceRows,
                                               kPitch, sums[m]);
            __syncthreads();
            const auto total_of = [&](int token, int row) {
                float total = 0;
#pragma unroll
                for (int w = 0; w < kWarps; w++)
                    total += *reinterpret_cast<const float *>(parts + w * parts_stride + (token * kPitch + row) * 4);
                return total;
            };
            const int of_block = base + row; /* the row among the block's */
            if (row >= split.pass_rows || of_block >= rows) continue;
            const int first_token = threadIdx.x / kRowSlots;
            const auto place_of = [&](int token) { return out + token * task.out.inner_stride + first_row + of_block; };
            if constexpr (kPlain) {
#pragma unroll
                for (int i = 0; i < kOwn; i++) {
                    const int token = first_token + i * kAtOnce;
                    if (token < share.tokens)
                        *place_of(token) = finish_output<T>(task, total_of(token, row), bias[of_block], addend[i]);
                }
            } else {
                if (task.linear.gated && row % 2 != 0) continue; /* the thread of the gate has up, too */
#pragma unroll 1
                for (int token = first_token; token < share.tokens; token += kAtOnce) {
                    const float factor = kLate ? token_factor<T>(task, split, fixed->squares[token]) : 1.0f;
                    const float sum = total_of(token, row) * factor;
                    if (!task.linear.gated) {
                        *place_of(token) = finish_output<T>(sum, bias[of_block]);
                        continue;
                    }
                    const float gate = sum + bias[of_block],
                                up = total_of(token, row + 1) * factor + bias[of_block + 1];
                    out[token * task.out.inner_stride + (first_row + of_block) / 2] = finish_gated<T>(task, gate, up);
                }
            }
        }
        if (counts) break;
        __syncthreads(); /* nobody looks at the tokens any more: they may come */
    }
}

/* ---- launchers ------------------------------------------------------------------------------------------------ */

template <typename T, int kTokens, int kRowTiles, DecodeForm kForm> mv_status
launch_decode_rows(const mv_task *task, DecodeSplit split, const DecodePart &part, int block_bytes, mv_error *error) {
    const Grid grid = {static_cast<unsigned>(part.blocks) << split.log_groups, kThreads,
                       static_cast<size_t>(block_bytes), part.cluster};
    return launch<decode_sm90a_kernel<T, kTokens, kRowTiles, kForm>>(task, grid, error, *task, split);
}

template <typename T, int kTokens, DecodeForm kForm>
mv_status launch_split(const mv_task *task, const Groups &groups, mv_error *error) {
    const int tokens = groups.tokens;
    const int64_t parts = parts_of(task, groups);
    DecodeSplit split = {};
    split.log_groups = groups.log_groups;
    split.group_tokens = tokens;
    split.log_threads = tokens == 1 ? 8 : tokens == 2 ? 7 : tokens <= 4 ? 6 : tokens <= 8 ? 5 : 4;
    const int step = Packet<T>::size << split.log_threads;
    split.held = (static_cast<int>(task->hidden) + step - 1) / step;
    const int block_bytes = block_bytes_of(task, groups);
    const DecodeRing ring = ring_for(task, groups, block_bytes);
    split.slots = ring.slots;
    split.slot_bytes = ring.slot_bytes;
    split.pass_rows = ring.pass_rows;
    split.one_pass = ring.pass_rows >= rows_of(task, groups);
    split.resident = holds_all(task, ring, groups);
    split.early = early_slots(task, groups, ring);
    split.rehearses = split.resident && task->static_weights && task->programmatic_launch &&
                      y_bytes(task, groups.y_rows) >= kPieceBytes;
    split.ring = ring_of(task, groups);
    split.norm_weight = split.ring + split.slots * kWarps * split.slot_bytes;
    split.y = split.norm_weight + norm_weight_bytes(task);
    split.parts = split.y + y_bytes(task, groups.y_rows);
    split.mean_scale = mean_scale<T>(*task);
    split.in_pairs =
        mv_norm_rounds_twice(task->rounding) && task->norm.weight_dtype == task->dtype && task->norm.weight_offset == 0;
    mv_status status = MV_OK;
    for (int64_t i = 0; i < parts && status == MV_OK; i++) {
        const DecodePart part = part_of(task, groups, i, parts);
        split.first_output = part.first_output;
        split.unit = unit_of(task);
        split.rows_per_block = part.outputs / split.unit / part.blocks * split.unit;
        split.more = part.outputs / split.unit % part.blocks;
        switch ((ring.pass_rows + kPieceRows - 1) / kPieceRows) {
        case 1: status = launch_decode_rows<T, kTokens, 1, kForm>(task, split, part, block_bytes, error); break;
        case 2: status = launch_decode_rows<T, kTokens, 2, kForm>(task, split, part, block_bytes, error); break;
        case 3: status = launch_decode_rows<T, kTokens, 3, kForm>(task, split, part, block_bytes, error); break;
        case 4: status = launch_decode_rows<T, kTokens, 4, kForm>(task, split, part, block_bytes, error); break;
        default:
            status = launch_decode_rows<T, kTokens, kMaxRowTiles, kForm>(task, split, part, block_bytes, error);
            break;
        }
    }
    return status;
}

template <typename T, int kTokens>
mv_status launch_decode_sm90a(const mv_task *task, const Groups &groups, mv_error *error) {
    return task->linear.plain_x ? launch_split<T, kTokens, DecodeForm::kPlain>(task, groups, error)
                                : launch_split<T, kTokens, DecodeForm::kNorm>(task, groups, error);
}

template <typename T> mv_status decode_sm90a(const mv_task *task, const Groups &groups, mv_error *error) {
    if constexpr (sizeof(T) == 4) {
        switch (groups.tokens) {
        case 1: return launch_decode_sm90a<T, 1>(task, groups, error);
        case 2: return launch_decode_sm90a<T, 2>(task, groups, error);
        default: return launch_decode_sm90a<T, 4>(task, groups, error);
        }
    } else {
        if constexpr (Dtype<T>::value == MV_BF16)
            if (groups.late) return launch_split<T, 8, DecodeForm::kLate>(task, groups, error);
        return groups.tokens <= 8 ? launch_decode_sm90a<T, 8>(task, groups, error)
                                  : launch_decode_sm90a<T, 16>(task, groups, error);
    }
}

/* Why a split cannot serve a task; `too_many` is said of tokens. */
const char *decode_why_not(const mv_task *task, const Groups &groups, const char *too_many) {
    const bool narrow = task->dtype != MV_F32;
    const int per_packet = narrow ? 8 : 4;
    if (task->linear.weight_dtype != task->dtype) return "it takes weights of x's dtype";
    if (task->linear.block[0].col_stride != 1) return "it needs weights that are contiguous along the hidden size";
    if (task->hidden % (8 * per_packet) != 0) return "the rows of the weight are no multiple of 128 bytes";
    if (task->linear.outputs > 1 << 24) return "it counts in 32 bits: there are too many outputs";
    if (task->hidden > 1 << 16) return "the tokens do not fit in shared memory";
    if (groups.tokens == 0) return narrow ? too_many : "it takes up to 4 tokens of float32";
    if (ring_for(task, groups, kWholeBytes).slots == 0) return "the tokens do not fit in shared memory";
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

} // namespace

/* ---- the rows -------------------------------------------------------------------------------------------------- */

extern "C" {
const char *mv_decode_sm90a_decide(const mv_task *task, double below, mv_decision *decision) {
    const Groups groups = counts_fit(task) ? choose_groups(task) : Groups{};
    const prices::DecodeRun run = run_of(task, groups);
    if (!mv_at_price(decision, prices::decode_sm90a_us(task, run), below)) return mv_too_dear;
    keep_cut(decision, groups);
    return decode_why_not(task, groups, "it takes up to 16 tokens, or 64 where the weights are small");
}

const char *mv_decode_heads_sm90a_decide(const mv_task *task, double below, mv_decision *decision) {
    if (!mv_at_price(decision, HUGE_VAL, below)) return mv_too_dear; /* only by name */
    if (const char *reason = norm_linear_why_not(task)) return reason;
    const Groups groups = counts_fit(task) ? choose_heads(task) : Groups{};
    keep_cut(decision, groups);
    if (const char *reason = decode_why_not(task, groups, "it takes up to 16 tokens")) return reason;
    for (const mv_block &block : task->linear.block)
        if (block.outputs % kHeadOutputs != 0)
            return "the outputs of q, k or v are no multiple of 128, the size of a head";
    return nullptr;
}

#define MV_ROWS(name)                                                                                                  \
    mv_status mv_linear_f32_##name(const mv_task *task, const mv_decision *decision, mv_error *error) {                \
        return decode_sm90a<float>(task, cut_of<Groups>(decision), error);                                             \
    }                                                                                                                  \
    mv_status mv_linear_f16_##name(const mv_task *task, const mv_decision *decision, mv_error *error) {                \
        return decode_sm90a<__half>(task, cut_of<Groups>(decision), error);                                            \
    }                                                                                                                  \
    mv_status mv_linear_bf16_##name(const mv_task *task, const mv_decision *decision, mv_error *error) {               \
        return decode_sm90a<__nv_bfloat16>(task, cut_of<Groups>(decision), error);                                     \
    }
MV_ROWS(decode_sm90a)
MV_ROWS(decode_heads_sm90a)
}

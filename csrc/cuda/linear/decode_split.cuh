/* decode_split.cuh: who takes what in the decode kernel of Hopper (decode_sm90a.cu): a call is cut into
 * launches, groups of tokens and blocks, and the shared memory of a block into its parts. */
#pragma once

#include "cuda/linear/decode_tokens.cuh"
#include "cuda/prices/linear.cuh"

namespace {

constexpr int kMaxRowTiles = 5;   /* of a pass */
constexpr int kMaxRows = 1 << 11; /* of a block */
constexpr int kMaxTokens = 16, kMaxTokensFloat32 = 4;
constexpr int kMaxLogGroups = 2, kGroupTokens = 2; /* at most so many groups of tokens, of at least so many each */
constexpr int kHalfBytes = 113 << 10; /* two blocks, and 1 KB of each for the system, fill the 228 KB of an SM */
constexpr int kWholeBytes = 227 << 10;

/* ---- shared memory ---------------------------------------------------------------------------------------------- */

constexpr int kMaxSlots = 24; /* of a warp */

/* What a block's shared memory begins with. Behind it: of each of the block's rows its address, then of each its bias;
 * the ring; the norm weights; y; and where sums meet beside the ring, room for them. */
template <int kTokens> struct alignas(16) DecodeFixed {
    uint64_t full[kWarps][kMaxSlots]; /* a barrier for each slot */
    float squares[kTokens][kWarps];   /* parts of the tokens' sums of squares; zeros where a token has fewer */
};
constexpr int kRowBytes = sizeof(void *) + sizeof(float);

int norm_weight_bytes(const mv_task *task) {
    return task->linear.plain_x
               ? 0
               : static_cast<int>(task->hidden) * static_cast<int>(mv_dtype_bytes(task->norm.weight_dtype));
}

int y_bytes(const mv_task *task, int rows) {
    return rows * static_cast<int>(task->hidden) * static_cast<int>(mv_dtype_bytes(task->dtype));
}

/* ---- tokens and outputs ------------------------------------------------------------------------------------------ */

/* Who takes what: each group of tokens has so many blocks, which share the outputs; or each head has blocks of its own,
 * with so many rows of it. */
struct Groups {
    int log_groups, tokens, blocks, y_rows;
    bool late;
    int head_rows = 0; /* 0: the split is even */
};

/* "fp32" of bfloat16 (float16 could overflow without the row factor): late where the tokens are few, and short enough
 * not to miss the room of their second part. */
bool is_late(const mv_task *task, int64_t tokens) {
    constexpr int kLateTokens = 2, kLateHidden = 3072;
    return !task->linear.plain_x && !mv_rounds_each_step(task->rounding) && task->dtype == MV_BF16 &&
           tokens <= kLateTokens && task->hidden <= kLateHidden;
}

/* Rows that one block has all of, and how many times as many there are: the gate's and up's of an output. */
int unit_of(const mv_task *task) { return task->linear.gated ? 2 : 1; }
int64_t units_of(const mv_task *task) { return task->linear.outputs / unit_of(task); }

Groups groups_of(const mv_task *task, int log_groups) {
    const int64_t tokens = (task->tokens + (1 << log_groups) - 1) >> log_groups;
    const int64_t blocks = min(units_of(task), int64_t{max(task->sm_count >> log_groups, 1)});
    const bool late = is_late(task, tokens);
    return {log_groups, static_cast<int>(tokens), static_cast<int>(blocks),
            static_cast<int>(late ? 2 * tokens : tokens), late};
}

/* Of a block, at most. */
int rows_of(const mv_task *task, const Groups &groups) {
    if (groups.head_rows) return groups.head_rows;
    const int64_t most = kMaxRows / unit_of(task), units = (units_of(task) + groups.blocks - 1) / groups.blocks;
    return static_cast<int>(min(units, most)) * unit_of(task);
}

/* Steps in which a warp multiplies its columns. */
int steps_of(const mv_task *task) {
    const int step = kWarps * 128 / static_cast<int>(mv_dtype_bytes(task->dtype));
    return static_cast<int>((task->hidden + step - 1) / step);
}

/* Tokens that the instance for so many is made for. */
int made_for(const Groups &groups) { return groups.y_rows <= 8 ? 8 : kMaxTokens; }

/* Where the ring begins. */
int ring_of(const mv_task *task, const Groups &groups) {
    const size_t fixed = made_for(groups) == 8 ? sizeof(DecodeFixed<8>) : sizeof(DecodeFixed<kMaxTokens>);
    return (static_cast<int>(fixed) + rows_of(task, groups) * kRowBytes + 127) / 128 * 128;
}

/* What the ring of a block is cut into. A pass is the rows that are multiplied at a time: all, where each warp has
 * slots enough for so many, and else fewer, whose sums then meet beside the ring. No slots: there is no room. */
struct DecodeRing {
    int pass_rows, slots, slot_bytes;
};

DecodeRing ring_for(const mv_task *task, const Groups &groups, int block_bytes) {
    constexpr int kMinSlots = 2, kPassBytes = 128 << 10; /* of a pass, where there are several */
    const int rows = rows_of(task, groups), row_bytes = static_cast<int>(task->hidden * mv_dtype_bytes(task->dtype));
    const int room = block_bytes - ring_of(task, groups) - norm_weight_bytes(task) - y_bytes(task, groups.y_rows);
    int tiles = (rows + kPieceRows - 1) / kPieceRows;
    if (tiles > kMaxRowTiles) tiles = min(max(kPassBytes / row_bytes / kPieceRows, 1), kMaxRowTiles);
    for (;; tiles--) {
        DecodeRing ring = {min(tiles * kPieceRows, rows), 0, 0};
        const bool meets_beside = ring.pass_rows < rows;
        const int parts = meets_beside ? kWarps * made_for(groups) * (ring.pass_rows + 4) * 4 : 0;
        /* An even number of rows, which are swapped in pairs; 10 at least, so that a slot has room for sums. */
        ring.slot_bytes = max((ring.pass_rows + 1) / 2 * 2, 10) * 128;
        ring.slots = min((room - parts) / (kWarps * ring.slot_bytes), kMaxSlots);
        if (ring.pass_rows == rows) ring.slots = min(ring.slots, steps_of(task)); /* all that there is to hold */
        if (ring.slots >= min(kMinSlots, steps_of(task))) return ring;
        if (tiles == 1) return {};
    }
}

int most_tokens(const mv_task *task) { return task->dtype == MV_F32 ? kMaxTokensFloat32 : kMaxTokens; }

/* Have all weights of a block a slot? */
bool holds_all(const mv_task *task, const DecodeRing &ring, const Groups &groups) {
    return ring.slots >= steps_of(task) && ring.pass_rows == rows_of(task, groups);
}

/* Each group reads all weights, but no block waits for all tokens: that pays where a block's weights have slots in half
 * of an SM. No tokens: there are too many. */
Groups choose_groups(const mv_task *task) {
    const bool narrow = task->dtype != MV_F32;
    const int most = most_tokens(task);
    if (task->tokens > most << (narrow ? kMaxLogGroups : 0)) return {};
    for (int log_groups = narrow ? kMaxLogGroups : 0; log_groups > 0; log_groups--) {
        const Groups groups = groups_of(task, log_groups);
        if (groups.tokens <= most && task->tokens >= kGroupTokens << log_groups &&
            holds_all(task, ring_for(task, groups, kHalfBytes), groups))
            return groups;
    }
    return task->tokens <= most ? groups_of(task, 0) : Groups{};
}

/* Whole heads: each has a cluster. Two blocks are the fewest that have room for a head; a block has a tile or more. */
constexpr int kHeadOutputs = 128, kMinCluster = 2, kMaxCluster = kHeadOutputs / kPieceRows;
static_assert(kHeadOutputs / kMinCluster <= kMaxRowTiles * kPieceRows, "a block has room for its part of a head");

/* As few as give each head two SMs. */
int64_t launches_of_heads(const mv_task *task) {
    const int64_t heads = (task->linear.outputs + kHeadOutputs - 1) / kHeadOutputs,
                  most = max(task->sm_count / kMinCluster, 1);
    return (heads + most - 1) / most;
}

/* Blocks of a head, in a launch of so many: the more the better, as long as each has an SM. */
int cluster_of(const mv_task *task, int64_t heads) {
    int cluster = kMaxCluster;
    while (cluster > kMinCluster && heads * cluster > task->sm_count) cluster /= 2;
    return cluster;
}

Groups choose_heads(const mv_task *task) {
    if (task->tokens > most_tokens(task)) return {};
    const int64_t outputs = kHeadOutputs * launches_of_heads(task);
    Groups groups = groups_of(task, 0);
    groups.head_rows = kHeadOutputs / cluster_of(task, (task->linear.outputs + outputs - 1) / outputs); /* at most */
    return groups;
}

/* Two blocks share an SM, where there is room for both, up to so many weights of each. The faster memory is,
 * the more. */
int block_bytes_of(const mv_task *task, const Groups &groups) {
    const int64_t few_bytes = int64_t{48} * (task->memory_gbs > 0 ? task->memory_gbs : 3352);
    const int64_t rows = groups.head_rows ? int64_t{groups.head_rows} * task->sm_count : task->linear.outputs;
    const int64_t weight_bytes = rows * task->hidden * static_cast<int64_t>(mv_dtype_bytes(task->dtype));
    const bool few = groups.log_groups > 0 || weight_bytes <= few_bytes * task->sm_count;
    return few && ring_for(task, groups, kHalfBytes).slots > 0 ? kHalfBytes : kWholeBytes;
}

/* What the price depends on; the tokens do not fit if there are none. */
prices::DecodeRun run_of(const mv_task *task, const Groups &groups) {
    if (groups.tokens == 0) return {};
    const DecodeRing ring = ring_for(task, groups, block_bytes_of(task, groups));
    const bool grouped = groups.log_groups > 0;
    return {static_cast<double>(y_bytes(task, groups.tokens)), grouped, !grouped && holds_all(task, ring, groups)};
}

/* The more tokens, the later they come, and the fewer weights may be asked for before them. */
int early_slots(const mv_task *task, const Groups &groups, const DecodeRing &ring) {
    constexpr int kEarlyBytes = 144 << 10;
    if (holds_all(task, ring, groups)) return ring.slots;
    const int early = (kEarlyBytes - y_bytes(task, groups.y_rows) * 5 / 4) / (kWarps * ring.slot_bytes);
    return min(max(early, 1), ring.slots - 1);
}

/* What a launch takes, and its blocks. */
struct DecodePart {
    int first_output, outputs, blocks;
    unsigned cluster;
};

/* More rows than the blocks can take at once are several launches. */
int64_t parts_of(const mv_task *task, const Groups &groups) {
    if (groups.head_rows) return launches_of_heads(task);
    const int64_t most = static_cast<int64_t>(groups.blocks) * kMaxRows;
    return (task->linear.outputs + most - 1) / most;
}

DecodePart part_of(const mv_task *task, const Groups &groups, int64_t part, int64_t parts) {
    const int64_t all = groups.head_rows ? task->linear.outputs / kHeadOutputs : units_of(task);
    const int first = static_cast<int>(all * part / parts), count = static_cast<int>(all * (part + 1) / parts) - first;
    const int unit = unit_of(task);
    if (!groups.head_rows) return {first * unit, count * unit, groups.blocks, 0};
    const int cluster = cluster_of(task, count);
    return {first * kHeadOutputs, count * kHeadOutputs, count * cluster, static_cast<unsigned>(cluster)};
}

} // namespace

/* decode_attention_sm80.cu: one new token per sequence against its cache, on any GPU.
 *
 *   s_j = scale q . k_j, or c tanh(s_j / c);  m = max_j s_j;  p_j = exp(s_j - m);  out = sum_j p_j v_j / sum_j p_j
 *
 * A block has a sequence, a key-value head and a piece of the keys. How long the piece is follows from the sequence's
 * position, which is read on the GPU, so that one graph serves every length. The block's queries go through norm and
 * rotary embedding into shared memory, and from there into registers. A key or a value is 16 bytes a lane, in a group
 * of lanes; a warp has several keys side by side and more on their way, for up to 4 query heads; other heads are other
 * warps', which find the keys in L1. Each group keeps a softmax of its own over the keys that it has met: m, the sum of
 * p_j and the sum of p_j v_j, scaled down whenever m grows. They are merged by shuffles, then in shared memory, and
 * those of the pieces by a second launch, always in the same order: nothing has to be zero before, and the bits are the
 * same every time. All of it is float32, P too.
 *
 * A step of a small model is a chain of such kernels, and what each costs is latency. So a block asks for its heads,
 * then, as soon as it knows the position, for its first keys and values, and only then goes on with the heads; the next
 * keys are on their way while values are added up, and the next values while scores are. A piece without keys leaves an
 * empty softmax, so that the second launch does not have to know how many pieces there are.
 *
 * The block whose piece has the new token makes its key, too: the first that one of its groups meets. So what has just
 * been written is read back by nobody. Only this block writes to the cache. */
#include "head.cuh"
#include "launch.cuh"
#include "norm_plan.cuh"

namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kMostHeads = 4;      /* of a warp */
constexpr int kMostGroup = 16;     /* of a block */
constexpr int kLeastKeys = 64;     /* of a piece: fewer are not worth a block */
constexpr int kMostColumns = 1024; /* of a head */
constexpr float kLog2E = 1.44269504088896341f;

/* How a call is cut. */
struct Cut {
    int32_t pieces;  /* of a sequence's keys, at most */
    int32_t passes;  /* blocks that share a key-value head, because it has too many query heads for one */
    int32_t group;   /* query heads of a block */
    int32_t of_head; /* query heads of a key-value head */
    int32_t shift;   /* key / page == key * reciprocal >> 30 + shift, of keys below 2^30 */
    uint64_t reciprocal;
};

/* What the groups of a row's lanes are: kLanes of them take kPackets packets each. kWhole: rows are whole aligned
 * packets. */
template <typename T_, int kLanes_, int kPackets_, int kHeads_, bool kWhole_> struct Shape {
    using T = T_;
    static constexpr int kLanes = kLanes_, kPackets = kPackets_, kHeads = kHeads_;
    static constexpr bool kWhole = kWhole_;
    static constexpr int kSize = Packet<T>::size, kValues = kPackets * kSize, kColumns = kLanes * kValues;
    static constexpr int kRows = 32 / kLanes;                                       /* of a warp, side by side */
    static constexpr int kUnroll = kPackets > 2 ? 1 : kHeads *kValues > 16 ? 2 : 4; /* of them on their way */
    static constexpr int kBlocks =
        kPackets == 1 && (kHeads <= 2 || sizeof(T_) == 2) ? 2 : 1; /* that an SM has room for */
    static constexpr int kStretch = kRows * kUnroll;               /* keys of a warp at a time */
};

/* Where the softmax of a block's part is: of a (query head, piece), with sum 0 where that has no keys. */
struct Partials {
    float2 *found; /* m and sum p_j */
    float *out;    /* [dim]: sum p_j v_j */
    __device__ __forceinline__ Partials(const mv_task &task, int pieces)
        : found(static_cast<float2 *>(task.workspace)), out(reinterpret_cast<float *>(found + task.tokens * pieces)) {}
};

/* exp(a - m) of base-2 logarithms. Without a key, or with scores of -infinity alone, m is that, and nothing weighs. */
__device__ __forceinline__ float weight(float a, float most) { return exp2f(a - (most == -INFINITY ? 0 : most)); }

/* A softmax over some keys for one query head, of which a lane has kValues columns. */
template <int kValues> struct Softmax {
    float most = -INFINITY, sum = 0, out[kValues] = {};

    /* Of the same columns, over other keys, in the lane `lanes` away. */
    __device__ __forceinline__ void merge_with_lane(int lanes) {
        const float both = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, lanes)), shrink = weight(most, both);
        most = both;
        sum *= shrink;
        sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
#pragma unroll
        for (int i = 0; i < kValues; i++) {
            out[i] *= shrink;
            out[i] += __shfl_xor_sync(0xffffffffu, out[i], lanes);
        }
    }
};

/* Head h of a sequence in x or out, whose rows are the heads of all sequences. */
template <typename T>
__device__ __forceinline__ T *head_address(const mv_task &task, const mv_rows &rows, int sequence, int64_t h) {
    const int64_t heads = task.attention.heads;
    T *const data = static_cast<T *>(rows.data);
    if (task.inner == heads) return data + sequence * rows.outer_stride + h * rows.inner_stride;
    return data + (sequence * heads + h) * rows.inner_stride; /* they are evenly apart */
}

/* ---- where the keys are ------------------------------------------------------------------------------------------ */

__device__ __forceinline__ int64_t integer_at(mv_integers integers, int64_t i) {
    return integers.wide ? static_cast<const int64_t *>(integers.data)[i * integers.stride]
                         : static_cast<const int32_t *>(integers.data)[i * integers.stride];
}

/* The keys of a sequence: `count` of them, of which the last is the new token's. 0: the sequence is skipped; -1: it
 * cannot be served. */
struct Keys {
    int count, piece, first; /* of a piece; the cache's row of key 0 */

    __device__ __forceinline__ Keys(const mv_task &task, int64_t sequence, int pieces) : count(0), piece(0), first(0) {
        const mv_attention &a = task.attention;
        const int64_t last = integer_at(a.positions, sequence);
        if (last < 0) return;
        const int64_t start = a.starts.data ? integer_at(a.starts, sequence) : 0;
        const int64_t from = max(max(start, last - a.window + 1), int64_t{0});
        count = -1;
        if (start > last || (!a.ring && last >= a.rows)) return;
        count = static_cast<int>(last - from) + 1;
        piece = max(kLeastKeys, (count + pieces - 1) / pieces);
        first = static_cast<int>(a.ring ? from % a.rows : from);
    }
};

/* A row of the cache: of a page, or of a sequence. block < 0: there is no such page. */
struct CacheRow {
    int block, row;
    __device__ __forceinline__ CacheRow(const mv_task &task, const Cut &cut, const Keys &keys, int sequence, int key) {
        const mv_attention &a = task.attention;
        row = keys.first + key;
        if (row >= a.rows) row -= static_cast<int>(a.rows); /* of a ring */
        block = sequence;
        if (!a.block_table) return;
        const int page = static_cast<int>((static_cast<uint64_t>(row) * cut.reciprocal) >> (30 + cut.shift));
        row -= page * static_cast<int>(a.block_rows);
        block = a.block_table[sequence * a.table_stride + page];
        if (block >= a.blocks) block = -1;
    }
    template <typename T> __device__ __forceinline__ T *of(const mv_cache &cache, int head) const {
        return static_cast<T *>(cache.data) + block * cache.block_stride + row * cache.row_stride +
               head * cache.head_stride;
    }
};

/* By all threads: has the sequence a page for each of its keys? */
__device__ __forceinline__ bool has_all_pages(const mv_task &task, const Cut &cut, const Keys &keys, int sequence) {
    __shared__ int missing;
    if (!task.attention.block_table) return true;
    if (threadIdx.x == 0) missing = 0;
    __syncthreads();
    const int page = static_cast<int>(task.attention.block_rows), blocks = (keys.first % page + keys.count - 1) / page;
    for (int i = threadIdx.x; i <= blocks; i += kThreads) {
        const int key = max(0, i * page - keys.first % page);
        if (CacheRow(task, cut, keys, sequence, key).block < 0) missing = 1;
    }
    __syncthreads();
    return !missing;
}

/* ---- the keys of a piece ----------------------------------------------------------------------------------------- */

template <typename S> using Row = Packet<typename S::T>[S::kPackets];

/* A lane's packets of a row; zeros past its end, and of a row that is not wanted. */
template <typename S>
__device__ __forceinline__ void load_row(Row<S> &row, const typename S::T *from, int member, int dim, bool wanted) {
#pragma unroll
    for (int p = 0; p < S::kPackets; p++) {
        const int at = (p * S::kLanes + member) * S::kSize;
        if constexpr (S::kWhole)
            row[p] = as_packet<typename S::T>(load_if(from + at, wanted && at < dim));
        else
            row[p] = load_packet(from + at, wanted ? dim - at : 0, false);
    }
}

template <typename S> struct Attention {
    using T = typename S::T;
    float q[S::kHeads][S::kValues];
    Softmax<S::kValues> head[S::kHeads];
    float scale, soft_cap; /* of base-2 logarithms: both include log2(e) */

    __device__ __forceinline__ float score(int h, const Row<S> &key) const {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < S::kValues; i++) sum = fmaf(q[h][i], key[i / S::kSize].get(i % S::kSize), sum);
        return warp_sum<S::kLanes>(sum) * scale;
    }

    template <int kCount> using Scores = float[S::kHeads][kCount];

    /* Keys that are not there weigh nothing. The soft cap is one piece of code that others jump over. */
    template <int kCount> __device__ __forceinline__ void
    add_scores(Scores<kCount> &scores, const Row<S> (&keys)[kCount], const bool (&there)[kCount]) const {
#pragma unroll
        for (int h = 0; h < S::kHeads; h++)
#pragma unroll
            for (int u = 0; u < kCount; u++) {
                const float found = score(h, keys[u]); /* by all lanes, which shuffle */
                scores[h][u] = there[u] ? found : -INFINITY;
            }
        if (soft_cap == 0) return;
#pragma unroll
        for (int h = 0; h < S::kHeads; h++)
#pragma unroll
            for (int u = 0; u < kCount; u++)
                if (there[u]) scores[h][u] = soft_cap * tanhf(scores[h][u] / soft_cap);
    }

    template <int kCount>
    __device__ __forceinline__ void add_values(const Scores<kCount> &scores, const Row<S> (&values)[kCount]) {
#pragma unroll
        for (int h = 0; h < S::kHeads; h++) {
            Softmax<S::kValues> &of = head[h];
            float most = of.most;
#pragma unroll
            for (int u = 0; u < kCount; u++) most = fmaxf(most, scores[h][u]);
            const float shrink = weight(of.most, most);
            of.most = most;
            of.sum *= shrink;
#pragma unroll
            for (int i = 0; i < S::kValues; i++) of.out[i] *= shrink;
#pragma unroll
            for (int u = 0; u < kCount; u++) {
                const float p = weight(scores[h][u], most);
                of.sum += p;
#pragma unroll
                for (int i = 0; i < S::kValues; i++)
                    of.out[i] = fmaf(p, values[u][i / S::kSize].get(i % S::kSize), of.out[i]);
            }
        }
    }
};

/* ---- kernels ----------------------------------------------------------------------------------------------------- */

/* What a warp does: kHeads of the block's query heads from `head` on, and every slots-th stretch of the keys. */
template <typename S> struct Share {
    int head, slot, slots;
    __host__ __device__ __forceinline__ Share(int group, int warp) {
        const int warps = (group + S::kHeads - 1) / S::kHeads; /* that see the same keys */
        slots = kWarps / warps;
        slot = warp / warps; /* == slots: this warp is over */
        head = warp % warps * S::kHeads;
    }
};

/* A block's shared memory: its queries, the new key and value; and of each slot what it has found. */
template <typename S> struct Shared {
    float *queries; /* [group][kColumns], zeros from dim on */
    Packet<typename S::T> *new_key, *new_value;
    float2 *found; /* [slots][group]: m and sum p_j */
    float *out;    /* the same with kColumns: sum p_j v_j */
    size_t bytes;

    __host__ __device__ __forceinline__ Shared(char *memory, int group) {
        const int parts = Share<S>(group, 0).slots * group;
        queries = reinterpret_cast<float *>(memory);
        out = queries + group * S::kColumns;
        new_key = reinterpret_cast<Packet<typename S::T> *>(out + parts * S::kColumns);
        new_value = new_key + S::kColumns / S::kSize;
        found = reinterpret_cast<float2 *>(new_value + S::kColumns / S::kSize);
        bytes = static_cast<size_t>(reinterpret_cast<char *>(found + parts) - memory);
    }
};

/* The heads that a block goes through norm and rotary embedding with: its queries, then the new key. A warp has every
 * kWarps-th; the first of them is on its way before the position is known. */
template <typename S> struct Heads {
    using T = typename S::T;
    using Columns = Head<T, S::kColumns / 32>;
    const mv_task &task;
    const int sequence, kv_head, first_head, group; /* the first query's head */
    Columns of;                                     /* the head that was asked for last */

    __device__ __forceinline__ Heads(const mv_task &task, int sequence, int kv_head, int first_head, int group)
        : task(task), sequence(sequence), kv_head(kv_head), first_head(first_head), group(group) {
        if (warp() <= group) load(warp());
    }
    static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x / 32); }
    __device__ __forceinline__ const T *kv_row(const mv_rows &rows) const {
        return static_cast<const T *>(rows.data) + sequence * rows.outer_stride + kv_head * rows.inner_stride;
    }

    __device__ __forceinline__ const mv_head_norm &norm_of(int h) const {
        return h < group ? task.attention.q_norm : task.attention.k_norm;
    }
    __device__ __forceinline__ void load(int h) {
        const mv_attention &a = task.attention;
        const T *x = h < group ? head_address<const T>(task, task.x, sequence, first_head + h) : kv_row(a.k);
        of.load(x, static_cast<int>(task.hidden), norm_of(h), a.rotary, sequence);
    }
    __device__ __forceinline__ void finish(int h, float *y) {
        of.finish(static_cast<int>(task.hidden), norm_of(h), task.attention.rotary, task.rounding, y, S::kColumns);
    }

    /* By all threads: into shared memory; with the new token also its key and value. */
    __device__ __forceinline__ void finish_all(const Shared<S> &shared, bool has_new) {
        float *const key = shared.out; /* not in use yet */
        const int count = has_new ? group + 1 : group;
#pragma unroll 1
        for (int h = warp(); h < count; h += kWarps) {
            if (h >= kWarps) load(h);
            finish(h, h < group ? shared.queries + h * S::kColumns : key);
            if (h < group) continue;
#pragma unroll 1
            for (int i = threadIdx.x % 32; i < S::kColumns; i += 32)
                reinterpret_cast<T *>(shared.new_key)[i] = from_float<T>(key[i]);
        }
        if (!has_new) return;
        const int dim = static_cast<int>(task.hidden);
        const T *value = kv_row(task.attention.v);
#pragma unroll 1
        for (int i = threadIdx.x; i < S::kColumns; i += kThreads)
            reinterpret_cast<T *>(shared.new_value)[i] = i < dim ? value[i] : from_float<T>(0);
    }
};

/* A warp's keys of [key, end) in the cache, a stretch at a time: what was asked for last. */
template <typename S> struct Stretches {
    using T = typename S::T;
    const mv_task &task;
    const Cut &cut;
    const Keys &keys;
    const int sequence, kv_head, apart, end;
    int key;           /* the first of the stretch */
    float missing = 0; /* NaN where there is no page for a key */
    Row<S> k[S::kUnroll], v[S::kUnroll];
    bool there[S::kUnroll];
    const T *value_at[S::kUnroll];

    __device__ __forceinline__ Stretches(const mv_task &task, const Cut &cut, const Keys &keys, int sequence,
                                         int kv_head, const Share<S> &share, int first, int end)
        : task(task), cut(cut), keys(keys), sequence(sequence), kv_head(kv_head), apart(share.slots * S::kStretch),
          end(end), key(first + share.slot * S::kStretch) {
        ask_for_keys();
        ask_for_values();
    }
    __device__ __forceinline__ bool any() const { return key < end; }

    __device__ __forceinline__ void ask_for_keys() {
        if (!any()) return;
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int u = 0; u < S::kUnroll; u++) {
            const int at = key + u * S::kRows + lane / S::kLanes;
            const CacheRow row(task, cut, keys, sequence, min(at, end - 1));
            if (row.block < 0) missing = NAN;
            there[u] = at < end && row.block >= 0;
            value_at[u] = row.of<const T>(task.attention.values, kv_head);
            load_row<S>(k[u], row.of<const T>(task.attention.keys, kv_head), lane % S::kLanes,
                        static_cast<int>(task.hidden), there[u]);
        }
    }
    __device__ __forceinline__ void ask_for_values() {
        if (!any()) return;
#pragma unroll
        for (int u = 0; u < S::kUnroll; u++)
            load_row<S>(v[u], value_at[u], threadIdx.x % S::kLanes, static_cast<int>(task.hidden), there[u]);
    }

    __device__ __forceinline__ void add_to(Attention<S> &attention) {
        while (any()) {
            typename Attention<S>::template Scores<S::kUnroll> scores;
            attention.add_scores(scores, k, there);
            key += apart;
            ask_for_keys();
            attention.add_values(scores, v);
            ask_for_values();
        }
    }
};

/* Leaves what a block's slots have found as one: where it is all that there is, as the result. */
template <typename S> __device__ __forceinline__ void merge_slots(const mv_task &task, const Cut &cut,
                                                                  const Shared<S> &shared, int slots, int sequence,
                                                                  int first_head, int group, int piece) {
    const int dim = static_cast<int>(task.hidden);
    const Partials partials(task, cut.pieces);
#pragma unroll 1
    for (int i = threadIdx.x; i < group * S::kColumns; i += kThreads) {
        const int h = i / S::kColumns, column = i % S::kColumns;
        if (column >= dim) continue;
        Softmax<1> all;
#pragma unroll 4
        for (int s = 0; s < slots; s++) all.most = fmaxf(all.most, shared.found[s * group + h].x);
#pragma unroll 4
        for (int s = 0; s < slots; s++) {
            const int part = s * group + h;
            const float2 found = shared.found[part];
            const float shrink = weight(found.x, all.most);
            all.sum += shrink * found.y;
            all.out[0] += shrink * shared.out[part * S::kColumns + column];
        }
        if (cut.pieces == 1) {
            head_address<typename S::T>(task, task.out, sequence, first_head + h)[column] =
                from_float<typename S::T>(all.out[0] / all.sum);
            continue;
        }
        const int64_t place = (sequence * task.attention.heads + first_head + h) * cut.pieces + piece;
        partials.out[place * dim + column] = all.out[0];
        if (column == 0) partials.found[place] = {all.most, all.sum};
    }
}

/* A piece without keys. Of a sequence that is skipped the first piece leaves a sum of 1, so that the result is 0; of
 * one that cannot be served all sums are 0, and it is NaN. */
template <typename T> __device__ __forceinline__ void write_empty(const mv_task &task, const Cut &cut, const Keys &keys,
                                                                  int sequence, int first_head, int group, int piece) {
    const int dim = static_cast<int>(task.hidden);
    const Partials partials(task, cut.pieces);
    for (int h = first_head; h < first_head + group; h++)
#pragma unroll 1
        for (int column = threadIdx.x; column < dim; column += kThreads) {
            const int64_t place = (sequence * task.attention.heads + h) * cut.pieces + piece;
            if (cut.pieces == 1) {
                head_address<T>(task, task.out, sequence, h)[column] = from_float<T>(keys.count < 0 ? NAN : 0);
                continue;
            }
            partials.out[place * dim + column] = 0;
            if (column) continue;
            const bool is_zero = keys.count == 0 && piece == 0;
            partials.found[place] = {is_zero ? 0 : -INFINITY, is_zero ? 1.0f : 0.0f};
        }
}

template <typename S> __global__ void __launch_bounds__(kThreads, S::kBlocks)
    decode_attention_kernel(const __grid_constant__ mv_task task, Cut cut) {
    using T = typename S::T;
    extern __shared__ __align__(16) char smem[];
    const mv_attention &a = task.attention;
    const int dim = static_cast<int>(task.hidden), of_head = cut.of_head;
    unsigned block = blockIdx.x;
    const auto next = [&](unsigned size) {
        const unsigned whole = block / size, rest = block - whole * size;
        block = whole;
        return static_cast<int>(rest);
    };
    const int piece = next(cut.pieces), pass = cut.passes == 1 ? 0 : next(cut.passes);
    const int kv_head = next(static_cast<unsigned>(a.kv_heads)), sequence = static_cast<int>(block);
    const int first_head = kv_head * of_head + pass * cut.group;
    const int group = min(cut.group, of_head - pass * cut.group);

    griddepcontrol_wait();
    griddepcontrol_launch();
    Heads<S> heads(task, sequence, kv_head, first_head, group);
    const Keys keys(task, sequence, cut.pieces);
    const int first = piece * keys.piece, end = min(first + keys.piece, keys.count);
    if (first >= end) {
        write_empty<T>(task, cut, keys, sequence, first_head, group, piece);
        return;
    }
    const Shared<S> shared(smem, cut.group);
    const Share<S> share(cut.group, threadIdx.x / 32);
    const bool has_new = end == keys.count, works = share.slot < share.slots;
    Stretches<S> stretches(task, cut, keys, sequence, kv_head, share, first, works ? end - has_new : 0);
    const bool whole = !has_new || has_all_pages(task, cut, keys, sequence);
    heads.finish_all(shared, has_new);
    __syncthreads();
    if (has_new && whole && pass == 0) {
        const CacheRow place(task, cut, keys, sequence, keys.count - 1);
#pragma unroll 1
        for (int i = threadIdx.x; i < dim; i += kThreads) {
            place.of<T>(a.keys, kv_head)[i] = reinterpret_cast<const T *>(shared.new_key)[i];
            place.of<T>(a.values, kv_head)[i] = reinterpret_cast<const T *>(shared.new_value)[i];
        }
    }

    const int lane = threadIdx.x % 32, member = lane % S::kLanes;
    if (works) {
        Attention<S> attention;
        attention.scale = a.scale * kLog2E;
        attention.soft_cap = a.soft_cap * kLog2E;
#pragma unroll
        for (int h = 0; h < S::kHeads; h++)
#pragma unroll
            for (int i = 0; i < S::kValues; i++)
                attention.q[h][i] = shared.queries[min(share.head + h, group - 1) * S::kColumns +
                                                   (i / S::kSize * S::kLanes + member) * S::kSize + i % S::kSize];
        if (has_new) {
            Row<S> k[1], v[1];
            const bool there[1] = {share.slot == 0 && lane < S::kLanes};
#pragma unroll
            for (int p = 0; p < S::kPackets; p++) {
                k[0][p] = shared.new_key[p * S::kLanes + member];
                v[0][p] = shared.new_value[p * S::kLanes + member];
            }
            typename Attention<S>::template Scores<1> scores;
            attention.add_scores(scores, k, there);
            attention.add_values(scores, v);
        }
        stretches.add_to(attention);
        const float missing = whole ? stretches.missing : NAN;
#pragma unroll
        for (int h = 0; h < S::kHeads; h++) {
            Softmax<S::kValues> &of = attention.head[h];
            of.sum += missing;
#pragma unroll
            for (int lanes = S::kLanes; lanes < 32; lanes *= 2) of.merge_with_lane(lanes);
            if (lane >= S::kLanes || share.head + h >= group) continue;
            const int part = share.slot * group + share.head + h;
            if (lane == 0) shared.found[part] = {of.most, of.sum};
#pragma unroll
            for (int i = 0; i < S::kValues; i++)
                shared.out[part * S::kColumns + (i / S::kSize * S::kLanes + member) * S::kSize + i % S::kSize] =
                    of.out[i];
        }
    }
    __syncthreads();
    merge_slots(task, cut, shared, share.slots, sequence, first_head, group, piece);
}

/* The pieces of a head become the result. So many are asked for at once. */
constexpr int kMergeThreads = 128, kMergePieces = 16;

template <typename T> __global__ void __launch_bounds__(kMergeThreads)
    merge_pieces_kernel(const __grid_constant__ mv_task task, Cut cut) {
    const int dim = static_cast<int>(task.hidden);
    const int64_t row = blockIdx.x, first = row * cut.pieces;
    const Partials partials(task, cut.pieces);
    T *const to = row_address<T>(task.out, task.inner, row); /* it divides while it waits */
    griddepcontrol_wait();
    griddepcontrol_launch();
    for (int column = threadIdx.x; column < dim; column += kMergeThreads) {
        Softmax<1> all;
        const float2 *of_row = partials.found + first;
        const float *out_of_row = partials.out + first * dim + column;
        for (int begin = 0; begin < cut.pieces; begin += kMergePieces) {
            float2 found[kMergePieces];
            float out[kMergePieces], both = all.most;
#pragma unroll
            for (int p = 0; p < kMergePieces; p++) {
                const bool is_one = begin + p < cut.pieces;
                found[p] = is_one ? of_row[begin + p] : float2{-INFINITY, 0};
                out[p] = is_one ? out_of_row[(begin + p) * dim] : 0;
                both = fmaxf(both, found[p].x);
            }
            const float shrink = weight(all.most, both);
            all.most = both, all.sum *= shrink, all.out[0] *= shrink;
#pragma unroll
            for (int p = 0; p < kMergePieces; p++) {
                const float of_piece = weight(found[p].x, both);
                all.sum += of_piece * found[p].y;
                all.out[0] += of_piece * out[p];
            }
        }
        to[column] = from_float<T>(all.out[0] / all.sum);
    }
}

/* ---- host -------------------------------------------------------------------------------------------------------- */

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

template <typename S> mv_status launch_shape(const mv_task *task, const mv_decision *decision, mv_error *error) {
    const Cut cut = cut_of<Cut>(decision);
    const mv_attention &a = task->attention;
    const int64_t sequences = task->tokens / a.heads;
    const Grid grid = {static_cast<unsigned>(sequences * a.kv_heads * cut.passes * cut.pieces), kThreads,
                       Shared<S>(nullptr, cut.group).bytes};
    const mv_status status = launch<decode_attention_kernel<S>>(task, grid, error, *task, cut);
    if (status != MV_OK || cut.pieces == 1) return status;
    const Grid merge = {static_cast<unsigned>(task->tokens), kMergeThreads, 0};
    return launch<merge_pieces_kernel<typename S::T>>(task, merge, error, *task, cut);
}

/* An instance, and how many of its blocks an SM has room for. */
struct Instance {
    mv_kernel *launch;
    int blocks;
};
template <typename S> constexpr Instance instance_of = {launch_shape<S>, S::kBlocks};

/* Query heads of a warp: as few as a key-value head has, in powers of two. */
template <typename T, int kLanes, int kPackets> Instance for_heads(int64_t heads) {
    if (heads <= 1) return instance_of<Shape<T, kLanes, kPackets, 1, true>>;
    if (heads <= 2) return instance_of<Shape<T, kLanes, kPackets, 2, true>>;
    return instance_of<Shape<T, kLanes, kPackets, 4, true>>;
}

/* Into how many pieces the keys of a sequence are cut: where `blocks` have one each and `room` of them run at a time,
 * every turn takes its latency, and its share of the bytes at the speed of memory. Figures of an H200. */
int64_t choose_pieces(const mv_task *task, int64_t keys, int64_t blocks, int64_t room) {
    const double latency_us = 2, bytes_per_us = 4e6 / static_cast<double>(room);
    const double us =
        static_cast<double>(2 * keys * task->hidden) * static_cast<double>(mv_dtype_bytes(task->dtype)) / bytes_per_us;
    double best_us = INFINITY;
    int64_t best = 1;
    for (int64_t turn = 1; turn <= 4; turn++) { /* as many pieces as that leaves room for */
        const int64_t fit = least(turn * room / blocks, parts(keys, kLeastKeys)), pieces = fit > 1 ? fit : 1;
        const double turns = static_cast<double>(parts(blocks * pieces, room));
        const double all_us = turns * (latency_us + us / static_cast<double>(pieces));
        if (all_us < best_us) best_us = all_us, best = pieces;
    }
    return best;
}

bool cache_aligned(const mv_cache &cache, int64_t per_packet) {
    return is_aligned16(cache.data) && cache.block_stride % per_packet == 0 && cache.row_stride % per_packet == 0 &&
           cache.head_stride % per_packet == 0;
}

/* At capacity, at the speed of memory. */
double price(const mv_task *task) {
    const mv_attention &a = task->attention;
    const double keys = static_cast<double>(least(a.rows, a.window)),
                 heads = static_cast<double>(task->tokens / a.heads * a.kv_heads);
    return 4 + 2 * keys * heads * static_cast<double>(task->hidden) * static_cast<double>(mv_dtype_bytes(task->dtype)) /
                   2.5e6;
}

template <typename T> const char *decide(const mv_task *task, double below, mv_decision *decision) {
    if (!mv_at_price(decision, price(task), below)) return mv_too_dear;
    constexpr int64_t size = Packet<T>::size;
    const mv_attention &a = task->attention;
    const int64_t packets = parts(task->hidden, size), of_head = a.heads / a.kv_heads;
    const bool whole = task->hidden % size == 0 && cache_aligned(a.keys, size) && cache_aligned(a.values, size);
    const bool fast = whole && packets <= (size == 4 ? 64 : 32);
    Cut cut = {};
    cut.passes = static_cast<int32_t>(parts(of_head, fast ? kMostGroup : kWarps));
    cut.group = static_cast<int32_t>(parts(of_head, cut.passes));
    cut.of_head = static_cast<int32_t>(of_head);
    while ((int64_t{1} << cut.shift) < a.block_rows) cut.shift++;
    cut.reciprocal = (uint64_t{1} << (30 + cut.shift)) / static_cast<uint64_t>(a.block_rows) + 1;
    const int64_t of_warp = cut.group > kMostHeads ? kMostHeads : cut.group;
    constexpr int most_packets = size == 4 ? 2 : 1; /* of a lane */
    const Instance instance = !fast           ? instance_of<Shape<T, 32, kMostColumns / 32 / size, 1, false>>
                              : packets <= 8  ? for_heads<T, 8, 1>(of_warp)
                              : packets <= 16 ? for_heads<T, 16, 1>(of_warp)
                              : packets <= 32 ? for_heads<T, 32, 1>(of_warp)
                                              : for_heads<T, 32, most_packets>(of_warp);
    decision->launch = instance.launch;
    /* Of a sequence alone, where the bits may not depend on others. */
    const int64_t sequences = task->batch_invariant ? 1 : task->tokens / a.heads;
    cut.pieces = static_cast<int32_t>(choose_pieces(task, least(a.rows, a.window), sequences * a.kv_heads * cut.passes,
                                                    int64_t{instance.blocks} * task->sm_count));
    keep_cut(decision, cut);
    if (cut.pieces > 1)
        decision->workspace = static_cast<size_t>(task->tokens * cut.pieces * (task->hidden + 2)) * sizeof(float);
    return nullptr;
}

mv_status run(const mv_task *task, const mv_decision *decision, mv_error *error) {
    const Cut cut = cut_of<Cut>(decision);
    const double blocks = static_cast<double>(task->tokens) * cut.passes * cut.pieces;
    if (blocks > INT32_MAX)
        return mv_fail(error, MV_BAD_VALUE, "decode_attention: q has %lld heads in all, more than a GPU's grid takes",
                       static_cast<long long>(task->tokens));
    return decision->launch(task, decision, error);
}

} // namespace

extern "C" const char *mv_attention_sm80_decide(const mv_task *task, double below, mv_decision *decision) {
    return task->dtype == MV_F32   ? decide<float>(task, below, decision)
           : task->dtype == MV_F16 ? decide<__half>(task, below, decision)
                                   : decide<__nv_bfloat16>(task, below, decision);
}

extern "C" mv_status mv_decode_attention_f32_sm80(const mv_task *task, const mv_decision *decision, mv_error *error) {
    return run(task, decision, error);
}
extern "C" mv_status mv_decode_attention_f16_sm80(const mv_task *task, const mv_decision *decision, mv_error *error) {
    return run(task, decision, error);
}
extern "C" mv_status mv_decode_attention_bf16_sm80(const mv_task *task, const mv_decision *decision, mv_error *error) {
    return run(task, decision, error);
}

/* decode_attention_sm80.cu: one new token per sequence against its cache, on any GPU.
 *
 *   s_j = scale q . k_j, or c tanh(s_j / c);  m = max_j s_j;  p_j = exp(s_j - m);  out = sum_j p_j v_j / sum_j p_j
 *
 * A block has a sequence, a key-value head and a piece of the keys. How long the piece is follows from the sequence's
 * position, which is read on the GPU, so that one graph serves every length. The block's queries go through norm and
 * rotary embedding into shared memory, and from there into registers. A key or a value is read by a
 * group of lanes, 16 bytes each; a warp has several keys side by side, loads several more at a time, and serves up to 4
 * query heads; further heads are for other warps, which find the keys in L1. Each group keeps a softmax of its own over
 * the keys that it has met: m, the sum of p_j and the sum of p_j v_j, scaled down whenever m grows. They are merged by
 * shuffles, then in shared memory, and those of the pieces by a second launch, always in the same order: nothing has to
 * be zero before, and the bits are the same every time. All of it is float32, P too.
 *
 * A step of a small model is a chain of such kernels, and what each costs is latency. So a block asks for its heads,
 * then, as soon as it knows the position, for its first keys and values, and only then goes on with the heads; the next
 * keys are loaded while values are added up, and the next values while scores are. A piece without keys leaves an
 * empty softmax, so that the second launch does not have to know how many pieces there are.
 *
 * The block whose piece has the new token makes its key, too: the first that one of its groups meets. So what has just
 * been written is read back by nobody. Only this block writes to the cache. */
#include "cuda/attention/block.cuh"
#include "cuda/attention/merge.cuh"
#include "cuda/prices/attention.cuh"

namespace {

constexpr int kMostHeads = 4;      /* of a warp */
constexpr int kMostGroup = 16;     /* query heads of a block */
constexpr int kMostColumns = 1024; /* of a head */
constexpr float kLog2E = 1.44269504088896341f;

/* Merges what the slots of a block have found. That is the result where a sequence has one piece; else it goes to the
 * workspace. */
template <typename S> __device__ __forceinline__ void merge_slots(const mv_task &task, const Cut &cut,
                                                                  const AttentionShared<S> &shared, int slots,
                                                                  int sequence, int first_head, int group, int piece) {
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

    griddepcontrol_launch();
    griddepcontrol_wait();
    Heads<S> heads(task, sequence, kv_head, first_head, group);
    const Keys keys(task, load_place(task, sequence), cut.pieces);
    const int first = piece * keys.piece, end = min(first + keys.piece, keys.count);
    if (first >= end) {
        write_empty<T>(task, cut, keys, sequence, first_head, group, piece);
        return;
    }
    const AttentionShared<S> shared(smem, cut.group);
    const HeadShare<S> share(cut.group, threadIdx.x / 32);
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

/* ---- host -------------------------------------------------------------------------------------------------------- */

template <typename S> mv_status launch_shape(const mv_task *task, const mv_decision *decision, mv_error *error) {
    const Cut cut = cut_of<Cut>(decision);
    const mv_attention &a = task->attention;
    const int64_t sequences = task->tokens / a.heads;
    const Grid grid = {static_cast<unsigned>(sequences * a.kv_heads * cut.passes * cut.pieces), kThreads,
                       AttentionShared<S>(nullptr, cut.group).bytes};
    const mv_status status = launch<decode_attention_kernel<S>>(task, grid, error, *task, cut);
    return status == MV_OK ? launch_merge<typename S::T>(task, cut, error) : status;
}

/* An instance, and how many of its blocks an SM has room for. */
struct ShapeInstance {
    mv_kernel *launch;
    int blocks;
};
template <typename S> constexpr ShapeInstance instance_of = {launch_shape<S>, S::kBlocks};

/* The instance whose warps have as many query heads as a key-value head has, rounded up to a power of two. */
template <typename T, int kLanes, int kPackets> ShapeInstance for_heads(int64_t heads) {
    if (heads <= 1) return instance_of<Shape<T, kLanes, kPackets, 1, true>>;
    if (heads <= 2) return instance_of<Shape<T, kLanes, kPackets, 2, true>>;
    return instance_of<Shape<T, kLanes, kPackets, 4, true>>;
}

/* Into how many pieces the keys of a sequence, of so many bytes for each head, are cut. There are `blocks` blocks for
 * each piece, of which `room` run at a time; they share what memory delivers. */
int64_t choose_pieces(int64_t keys, double bytes, int64_t blocks, int64_t room) {
    const double us = bytes * static_cast<double>(room) / prices::kAttentionCoresRate;
    double best_us = INFINITY;
    int64_t best = 1;
    for (int64_t turn = 1; turn <= 4; turn++) { /* with as many pieces as there is room for */
        const int64_t fit = least(turn * room / blocks, parts(keys, kLeastKeys)), pieces = fit > 1 ? fit : 1;
        const double turns = static_cast<double>(parts(blocks * pieces, room));
        const double all_us = turns * (prices::kAttentionCoresTurn + us / static_cast<double>(pieces));
        if (all_us < best_us) best_us = all_us, best = pieces;
    }
    return best;
}

template <typename T> const char *decide(const mv_task *task, double below, mv_decision *decision) {
    constexpr int64_t size = Packet<T>::size;
    const mv_attention &a = task->attention;
    const int64_t keys = least(a.rows, a.window), heads = priced_sequences(task) * a.kv_heads;
    const double bytes_of_head = 2 * sizeof(T) * static_cast<double>(keys * task->hidden);
    const double bytes = bytes_of_head * static_cast<double>(heads);
    if (!mv_at_price(decision, bytes / prices::memory_rate(task), below)) return mv_too_dear; /* at least */
    const int64_t packets = parts(task->hidden, size);
    const bool whole = task->hidden % size == 0 && cache_aligned(a.keys, size) && cache_aligned(a.values, size);
    const bool fast = whole && packets <= (size == 4 ? 64 : 32);
    Cut cut = cut_of_heads(task, fast ? kMostGroup : kWarps);
    const int64_t of_warp = cut.group > kMostHeads ? kMostHeads : cut.group;
    constexpr int most_packets = size == 4 ? 2 : 1; /* of a lane */
    const ShapeInstance instance = !fast           ? instance_of<Shape<T, 32, kMostColumns / 32 / size, 1, false>>
                                   : packets <= 8  ? for_heads<T, 8, 1>(of_warp)
                                   : packets <= 16 ? for_heads<T, 16, 1>(of_warp)
                                   : packets <= 32 ? for_heads<T, 32, 1>(of_warp)
                                                   : for_heads<T, 32, most_packets>(of_warp);
    decision->launch = instance.launch;
    const int64_t blocks = heads * cut.passes, room = int64_t{instance.blocks} * task->sm_count;
    cut.pieces = static_cast<int32_t>(choose_pieces(keys, bytes_of_head, blocks, room));
    const double turns = static_cast<double>(parts(blocks * cut.pieces, room));
    if (!mv_at_price(decision, prices::attention_cores_us(task, bytes, turns), below)) return mv_too_dear;
    keep_cut(decision, cut);
    decision->workspace = workspace_bytes(task, cut);
    return nullptr;
}

} // namespace

extern "C" const char *mv_attention_sm80_decide(const mv_task *task, double below, mv_decision *decision) {
    return task->dtype == MV_F32   ? decide<float>(task, below, decision)
           : task->dtype == MV_F16 ? decide<__half>(task, below, decision)
                                   : decide<__nv_bfloat16>(task, below, decision);
}

extern "C" mv_status mv_decode_attention_f32_sm80(const mv_task *task, const mv_decision *decision, mv_error *error) {
    return run_attention(task, decision, error);
}
extern "C" mv_status mv_decode_attention_f16_sm80(const mv_task *task, const mv_decision *decision, mv_error *error) {
    return run_attention(task, decision, error);
}
extern "C" mv_status mv_decode_attention_bf16_sm80(const mv_task *task, const mv_decision *decision, mv_error *error) {
    return run_attention(task, decision, error);
}

/* 3xtf32_sm90a.cu: the projection of float32 on Hopper's tensor cores, at float32's accuracy: the second
 * launch of a plan whose first is the norm kernel.
 *
 * The tensor cores multiply TF32, which has 11 of float32's 24 bits. So a value becomes two, v = high + low, and a
 * product three: high high + high low + low high; what is left out is 2^-22 of it at most. The norm kernel writes y as
 * two planes; weights are taken apart in registers, on their way from shared memory.
 *
 * The tensor cores cut off what does not fit a sum, and always towards zero. So a sum there is of one step, small
 * products first, and joins float32 totals in registers, which round to the nearest.
 *
 * A CTA has tiles of 128 outputs and 8 to 128 tokens. Two warpgroups have 64 outputs each, as the rows of the product,
 * and take turns: one multiplies while the other takes its next weights apart. One thread brings the steps along hidden
 * to a ring in shared memory. Tiles come in waves, one for each CTA. Those that are left are split along hidden, so
 * that each of some CTAs has as many steps; who comes last to a tile adds its parts, in the order of hidden.
 *
 * With allow_tf32 high high is all, and all steps of a sum stay in the tensor cores. Then tiles have 256 outputs. */
#include "cuda/arch/launch.cuh"
#include "cuda/cuda.h"
#include "cuda/linear/epilogue.cuh"
#include "cuda/linear/plan.cuh"
#include "cuda/linear/tf32_product.cuh"
#include "cuda/prices/linear.cuh"

namespace {

constexpr int kConsumersBarrier = 1;
constexpr int kOwnRegisters = 224, kOtherRegisters = 3 * 168 - 2 * kOwnRegisters;

/* Leaves this CTA's part of a tile to who comes last. If that is this one, it has the sums of all parts. */
template <typename T> __device__ __forceinline__ bool join_parts(const Tf32Product &p, const Work &work,
                                                                 Tf32Sums<T> &total, unsigned *before) {
    const unsigned steps = static_cast<unsigned>(p.steps), done = work.to - work.from;
    const unsigned tile = work.tile - p.whole_tiles, last = cta_of(p, (tile + 1) * steps - 1);
    /* A CTA may have a part of its first tile, and another of its last one. */
    const auto part_of = [&](unsigned cta) {
        const bool later = first_step(p, cta) / steps != tile;
        return p.parts + (2 * int64_t{cta} + later) * T::part_floats + threadIdx.x;
    };
    float *const own = part_of(blockIdx.x);
#pragma unroll
    for (int i = 0; i < T::sums; i++) __stcg(own + i * kConsumers, total[i]);
    warps_barrier(kConsumersBarrier, kConsumers);
    if (threadIdx.x == 0) *before = add_acquire_release(p.counters + tile, done);
    warps_barrier(kConsumersBarrier, kConsumers);
    if (*before + done < steps) return false;

    constexpr unsigned kAtOnce = T::sums <= 16 ? 4 : T::sums <= 32 ? 2 : 1; /* parts that are loaded together */
#pragma unroll
    for (int i = 0; i < T::sums; i++) total[i] = 0;
#pragma unroll 1
    for (unsigned cta = cta_of(p, tile * steps); cta <= last; cta += kAtOnce) {
        Tf32Sums<T> part[kAtOnce];
#pragma unroll
        for (unsigned a = 0; a < kAtOnce; a++) {
            const float *const from = part_of(min(cta + a, last));
#pragma unroll
            for (int i = 0; i < T::sums; i++) part[a][i] = load_past_l1(from + i * kConsumers);
        }
#pragma unroll
        for (unsigned a = 0; a < kAtOnce; a++)
#pragma unroll
            for (int i = 0; i < T::sums; i++) total[i] += cta + a <= last ? part[a][i] : 0.0f;
    }
    return true;
}

/* One output, term after term: for sums that are not finite. Infinity is more than two parts can say. */
__device__ __noinline__ float plain_dot(const Tf32Product &p, int64_t token, const mv_block &block, int64_t row) {
    const float *w = static_cast<const float *>(block.weight) + row * block.row_stride;
    const float *high = static_cast<const float *>(p.task.x.data) + token * p.task.hidden;
    float sum = 0;
    for (int64_t k = 0; k < p.task.hidden && sum == sum; k++)
        sum = fmaf(p.low_plane ? high[k] + high[k + p.low_plane] : high[k], w[k], sum);
    return sum;
}

/* Lane l of sums 4 j + {0, 1} of a block: output l / 4 of its warp's 16, tokens 8 j + 2 (l % 4) + {0, 1}; of
 * 4 j + {2, 3}: output l / 4 + 8. */
template <typename T, bool kAdds> __device__ __forceinline__ void
store_tf32_outputs(const Tf32Product &p, const Tf32Place &place, int first, const float (&total)[T::block_sums]) {
    const int lane = threadIdx.x % 32;
    const mv_block &block = p.task.linear.block[place.block];
    const int64_t row = place.row + first, outputs = outputs_of(p.task, place.block);
    const bool exists[2] = {row < outputs, row + 8 < outputs};
    float bias[2] = {};
    if (block.bias) {
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (exists[i]) bias[i] = load_as_past_l1<float>(block.bias, block.bias_dtype, row + 8 * i);
    }
    const auto token_of = [&](int i) { return place.token + i / 2 * 8 + lane % 4 * 2 + i % 2; };
    const auto outputs_at = [&](int64_t token) {
        return row_address<float>(p.task.out, p.task.inner, token) + place.output + first;
    };
    const auto addends_at = [&](int64_t token) {
        return kAdds ? addend_row<float>(p.task, token) + place.output + first : nullptr;
    };
    const auto finished = [&](float sum, int lower, const float *addends) {
        if constexpr (!kAdds) return finish_output<float>(sum, bias[lower]);
        return join_addend<float>(p.task, sum + bias[lower], load_past_l1(addends + 8 * lower));
    };
    float none = 0;     /* times a sum: NaN, if that is not finite */
    uint64_t later = 0; /* outputs that are not stored yet: they may lie where their addends do */
#pragma unroll
    for (int i = 0; i < T::block_sums / 2; i++) {
        if (token_of(i) >= p.task.tokens) continue;
        float *const to = outputs_at(token_of(i));
        const float *const addends = addends_at(token_of(i));
#pragma unroll
        for (int lower = 0; lower < 2; lower++) {
            const float sum = total[i / 2 * 4 + lower * 2 + i % 2];
            none = fmaf(none, sum, 0.0f);
            if (kAdds && !(fabsf(sum) < INFINITY))
                later |= uint64_t{1} << (2 * i + lower);
            else if (exists[lower])
                to[8 * lower] = finished(sum, lower, addends);
        }
    }
    if (none == 0) return;
#pragma unroll 1
    for (int i = 0; i < T::block_sums / 2; i++) {
        if (token_of(i) >= p.task.tokens) continue;
        float *const to = outputs_at(token_of(i));
#pragma unroll
        for (int lower = 0; lower < 2; lower++)
            if (exists[lower] && (kAdds ? later >> (2 * i + lower) & 1 : !(fabsf(to[8 * lower]) < INFINITY)))
                to[8 * lower] =
                    finished(plain_dot(p, token_of(i), block, row + 8 * lower), lower, addends_at(token_of(i)));
    }
}

template <typename T, bool kAdds> __global__ void __launch_bounds__(T::threads, 1)
    tf32_kernel(const __grid_constant__ Tf32Product p) {
    extern __shared__ __align__(1024) char smem[];
    const Tf32Ring<T> ring(uniform(shared_address(smem)));
    const int warp = static_cast<int>(uniform(threadIdx.x / 32));
    if (threadIdx.x % 32 == 0) ring.init_barriers(warp);
    __syncthreads();
    if (warp >= kConsumers / 32) {
        if constexpr (T::trades_registers) fewer_registers<kOtherRegisters>();
        if (warp == kConsumers / 32 && elect_lane()) produce<T>(p, ring);
        __syncwarp();
        return;
    }
    if constexpr (T::trades_registers) more_registers<kOwnRegisters>();
    if (kAdds || !p.task.static_weights) griddepcontrol_wait(); /* for the addends and the biases */
    unsigned *const before = reinterpret_cast<unsigned *>(smem + T::ring_bytes + 16 * T::stages);
    const int half = warp / 4;
    if (!T::once && half == 1) give_turn(half); /* the first step is the first warpgroup's */
    Slot slot;
    Works works(p);
    for (Work work; works.next(work);) {
        Tf32Sums<T> total = {};
        if constexpr (T::once)
            multiply_once<T>(total, smem, ring, slot, work.to - work.from);
        else
            multiply_tf32<T>(total, smem, ring, slot, work.to - work.from);
        const bool whole = work.to - work.from == static_cast<unsigned>(p.steps);
        if (whole || join_parts<T>(p, work, total, before)) {
            const Tf32Place place = find_tf32_place<T>(p, work.tile);
#pragma unroll
            for (int b = 0; b < T::blocks; b++)
                store_tf32_outputs<T, kAdds>(p, place, T::first_row(b), block_of<T>(total, b));
        }
        __syncwarp(); /* what follows is for whole warps */
    }
    if (!T::once && half == 0) await_turn(half); /* nobody's: the last step was the other one's */
}

/* ---- launch ---------------------------------------------------------------------------------------------------- */

/* What the plan keeps in the workspace, one after the other. */
struct Workspace {
    Tf32TileChoice choice;
    int64_t padded_tokens; /* rows of y's planes: all that copies read */
    size_t plane_bytes, y_bytes, parts_bytes, counter_bytes;

    Workspace(const mv_task *task, const Tf32TileChoice &choice) : choice(choice) {
        padded_tokens = ceil_div(task->tokens, choice.tokens) * choice.tokens;
        plane_bytes = static_cast<size_t>(padded_tokens * task->hidden) * 4;
        y_bytes = (task->linear.allow_tf32 ? 1 : 2) * plane_bytes;
        parts_bytes = static_cast<size_t>(2 * choice.sharers * choice.outputs * choice.tokens) * 4;
        counter_bytes = static_cast<size_t>(choice.split_tiles) * 4;
    }
    size_t bytes() const { return y_bytes + parts_bytes + counter_bytes; }
    float *parts(const mv_task *task) const {
        return reinterpret_cast<float *>(static_cast<char *>(task->workspace) + y_bytes);
    }
    uint32_t *counters(const mv_task *task) const {
        return reinterpret_cast<uint32_t *>(parts(task) + parts_bytes / 4);
    }
};

template <typename T> mv_status launch_tf32_tile(const mv_task *task, const Workspace &workspace, mv_error *error) {
    const Tf32TileChoice &choice = workspace.choice;
    Tf32Product p = {};
    p.task = *task;
    p.low_row = static_cast<int>(workspace.padded_tokens);
    p.low_plane = T::once ? 0 : workspace.padded_tokens * task->hidden;
    p.steps = static_cast<int>(ceil_div(task->hidden, kTf32Step));
    p.rows = static_cast<unsigned>(ceil_div(task->tokens, T::tokens));
    p.columns = static_cast<unsigned>(block_columns(task, T::outputs));
    p.group = max(1024 / T::tokens, 1);
    p.whole_tiles = static_cast<unsigned>(choice.whole_tiles);
    p.split_tiles = static_cast<unsigned>(choice.split_tiles);
    p.sharers = static_cast<unsigned>(choice.sharers);
    p.parts = workspace.parts(task);
    p.counters = workspace.counters(task);

    const int64_t hidden = task->hidden;
    mv_status status = encode_map(
        &p.y, {task->x.data, MV_F32, (T::once ? 1 : 2) * workspace.padded_tokens, hidden, hidden, T::tokens, kTf32Step},
        error);
    for (int i = 0; i < 3 && status == MV_OK; i++) {
        const mv_block &block = task->linear.block[i];
        const int64_t outputs = task->linear.packed ? task->linear.outputs : block.outputs;
        if (outputs > 0)
            status = encode_map(
                &p.weight[i], {block.weight, MV_F32, outputs, hidden, block.row_stride, T::outputs, kTf32Step}, error);
        if (task->linear.packed) break;
    }
    if (status != MV_OK) return status;

    const unsigned ctas = p.whole_tiles > 0 ? static_cast<unsigned>(task->sm_count) : p.sharers;
    const Grid grid = {ctas, T::threads, T::ring_bytes + kBarrierBytes};
    return task->linear.addend.data ? launch<tf32_kernel<T, true>>(task, grid, error, p)
                                    : launch<tf32_kernel<T, false>>(task, grid, error, p);
}

template <bool kOnce, int... kTokens>
mv_status launch_tf32_one_of(const mv_task *task, const Workspace &workspace, mv_error *error) {
    mv_status status = MV_OK;
    ((workspace.choice.tokens == kTokens
          ? void(status = launch_tf32_tile<Tf32Tile<kTokens, kOnce>>(task, workspace, error))
          : void()),
     ...);
    return status;
}

const char *tf32_why_not(const mv_task *task) {
    if (task->smem_bytes < kRingBytes + kBarrierBytes) return "there is too little shared memory";
    if (task->linear.weight_dtype != MV_F32) return "it takes float32 weights";
    if (task->linear.block[0].col_stride != 1)
        return "it takes weights as nn.Linear keeps them or their .t(), not a transposed copy";
    if (task->hidden % 4 != 0) return "hidden is no multiple of 4";
    if (task->hidden > 1 << 20) return "hidden is more than 1,048,576";
    if (task->linear.outputs > INT32_MAX - 256 || task->tokens > INT32_MAX / 2 - 256)
        return "a tensor map has coordinates of 32 bits";
    if (ceil_div(task->tokens, 8) * block_columns(task, tile_outputs(task->linear.allow_tf32)) > INT32_MAX)
        return "there are more tiles than one launch can take";
    for (const mv_block &block : task->linear.block) {
        if (block.outputs > 0 && (!is_aligned16(block.weight) || block.row_stride % 4 != 0 || block.row_stride <= 0 ||
                                  block.row_stride >= int64_t{1} << 37))
            return "the rows of the weight are not 16-byte aligned, or too far apart";
        if (task->linear.packed) break;
    }
    return nullptr;
}

} // namespace

/* ---- the row --------------------------------------------------------------------------------------------------- */

extern "C" {
mv_kernel mv_rms_norm_f32_sm80;

const char *mv_norm_3xtf32_sm90a_decide(const mv_task *task, double below, mv_decision *decision) {
    const Tf32TileChoice choice = choose_tf32_tile(task);
    if (!mv_at_price(decision, prices::norm_3xtf32_us(task, choice.us), below)) return mv_too_dear;
    if (task->linear.gated) return kNotGated;
    if (const char *reason = tf32_why_not(task)) return reason;
    decision->workspace = Workspace(task, choice).bytes();
    keep_cut(decision, choice);
    return nullptr;
}

mv_status mv_linear_f32_norm_3xtf32_sm90a(const mv_task *task, const mv_decision *decision, mv_error *error) {
    PlanTasks tasks = plan_tasks(task);
    tasks.product.x = tasks.norm.out; /* also of a plain x, which it does not take in one part */
    const Workspace workspace(task, cut_of<Tf32TileChoice>(decision));
    tasks.norm.next.low_plane = static_cast<int64_t>(workspace.plane_bytes / 4);
    tasks.norm.next.counters = workspace.counters(task);
    tasks.norm.next.counter_count = static_cast<int64_t>(workspace.counter_bytes / 4);
    const mv_status status = make_y(&tasks.norm, decision, mv_rms_norm_f32_sm80, error);
    if (status != MV_OK) return status;
    return task->linear.allow_tf32
               ? launch_tf32_one_of<true, 8, 16, 32, 64, 96, 128>(&tasks.product, workspace, error)
               : launch_tf32_one_of<false, 8, 16, 32, 64, 96, 128>(&tasks.product, workspace, error);
}
}

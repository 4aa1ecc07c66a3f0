/* wgmma_sm90a.cu: the projection of many tokens on Hopper's tensor cores, for 16-bit x and weights: the
 * second launch of the plan whose first is the norm kernel. That one normalises the rows that the first wave of tiles
 * needs, and spare warps of this one the others, while the tensor cores work (norm_rows.cuh). For bfloat16 and "fp32"
 * also the only launch (late_product.cuh).
 *
 * The weights' first steps are on their way before the wait for the norm: to shared memory where static_weights allows
 * it, else to L2. */
#include "cuda/arch/launch.cuh"
#include "cuda/cuda.h"
#include "cuda/linear/late_product.cuh"
#include "cuda/linear/plan.cuh"
#include "cuda/linear/token_tile.cuh"
#include "cuda/linear/wgmma_store.cuh"
#include "cuda/norm/norm_rows.cuh"
#include "cuda/prices/linear.cuh"

namespace {

/* Registers: what a quarter of the SM has for 3 of the 9 or 12 warps. Of 12, which multiply whole tiles, the consumers
 * get those of the others. */
template <typename T, typename Tile> __global__ void __launch_bounds__(kMostThreads, 1)
    wgmma_kernel(const __grid_constant__ WgmmaProduct p) {
    extern __shared__ __align__(1024) char smem[];
    const unsigned rank = p.cluster > 1 ? cluster_rank() : 0;
    const int warp = static_cast<int>(uniform(threadIdx.x / 32));
    const unsigned items = p.rows * p.columns, first = blockIdx.x / p.cluster, apart = gridDim.x / p.cluster;
    const bool consumes = warp < kConsumers / 32, produces = warp == kConsumers / 32;
    WgmmaPlace first_place = {};
    const WgmmaRing<Tile> new_ring(p, uniform(shared_address(smem)));
    const int own = own_stages(p, new_ring.stages);
    if (consumes) {
        if (elect_lane()) new_ring.init_barriers(own + warp, new_ring.stages, kConsumers / 32, p.cluster);
    } else if (produces) {
        first_place = find_wgmma_place<Tile>(p, first, rank);
        if (elect_lane()) Producer<Tile, false>{p, new_ring, rank}.start(first_place, own);
    }
    __syncwarp();
    p.cluster > 1 ? cluster_barrier() : __syncthreads(); /* all barriers are initialised */

    /* Once more, since uniform registers do not outlive branches that lanes take apart. */
    const WgmmaRing<Tile> ring(p, uniform(shared_address(smem)));
    if (Tile::spare_warps || Tile::trades_registers ? !consumes : produces) {
        if constexpr (Tile::trades_registers) fewer_registers<Tile::other_registers>();
        if (!produces) {
            if constexpr (Tile::spare_warps) normalise_rows(p.norm, p.counters, static_cast<T *>(p.norm.workspace));
        } else if (elect_lane()) {
            if (p.cluster > 1)
                Producer<Tile, true>{p, ring, rank}.run(first_place, own, first, items, apart);
            else
                Producer<Tile, false>{p, ring, rank}.run(first_place, own, first, items, apart);
        }
        __syncwarp();
    } else {
        if constexpr (Tile::trades_registers) more_registers<Tile::own_registers>();
        const int half = warp / 4, thread = threadIdx.x % 128;
        char *const out = smem + half * Tile::own_out_bytes;
        float *const bias = reinterpret_cast<float *>(smem + Tile::out_bytes) + half * Tile::own_outputs;
        if (Tile::adds || !p.static_weights) griddepcontrol_wait(); /* for the addends and the biases */
        float sum[Tile::own_parts][Tile::N / 2];
        Slot slot;
        const unsigned turn = Tile::whole ? half : 0;
        if (Tile::whole) slot.skip(ring.stages, turn * p.steps);
        if (Tile::late && half == 1) give_turn(1); /* the first step is the first warpgroup's */
        for (unsigned item = first + turn * apart; item < items; item += Tile::tile_turns * apart) {
            WgmmaPlace place = find_wgmma_place<Tile>(p, item, rank);
            if (Tile::shared_tokens) place.token += half * 64;
            if (Tile::shared_steps) place.output += half * Tile::own_columns;
            const Segment &segment = p.segment[place.segment];
            TileAddends<T, Tile> addends;
            if constexpr (Tile::adds) addends.load_early(p, place);
            const auto bias_of = [&](int n) {
                const Segment &of = Tile::gated ? p.segment[n / Tile::own_columns] : segment;
                const int output = place.output + (Tile::gated ? n % Tile::own_columns : n);
                return of.bias && output < of.outputs ? load_as_past_l1<T>(of.bias, of.bias_dtype, output) : 0.0f;
            };
            if constexpr (!Tile::shared_steps) {
                for (int n = thread; n < Tile::own_outputs; n += 128) bias[n] = bias_of(n);
                if (Tile::whole && item != first) await_turn(half);
                if constexpr (Tile::late)
                    multiply_late<T, Tile>(sum[0], ring, slot, p);
                else
                    multiply_wgmma<T, Tile>(sum, ring, slot, p.steps, p.cluster, Tile::whole && item + apart < items);
                if (Tile::whole) slot.skip(ring.stages, p.steps);
#pragma unroll
                for (int part = 0; part < Tile::own_parts; part++, place.token += 64) {
                    if constexpr (Tile::adds) {
                        if (part == 0) warps_barrier(1 + half, 128); /* all biases are there */
                        addends.join(sum[part], p, place, bias);
                    }
                    by_activation<Tile>(
                        p, [&](auto known) { store_tile<T, Tile, known.value>(sum[part], p, place, out, bias); });
                }
            } else {
                const float own_bias = thread < Tile::own_outputs ? bias_of(thread) : 0.0f;
                const PairRows<T> rows(p, p.out, place);
                multiply_wgmma<T, Tile>(sum, ring, slot, p.steps, p.cluster, false);
                warps_barrier(kExchangeBarrier, kConsumers); /* all have stored the tile before */
                if (thread < Tile::own_outputs) bias[thread] = own_bias;
                float own[Tile::own_outputs / 2];
                exchange<Tile>(own, sum[0], smem, half);
                if constexpr (Tile::adds) addends.join(own, p, place, bias);
                by_activation<Tile>(p, [&](auto known) {
                    store_pairs<T, Tile, known.value>(own, p, rows, Tile::adds ? place.own_output - place.output : 0,
                                                      segment.outputs - place.output, bias);
                });
            }
        }
        if (Tile::late && half == 0) await_turn(0); /* nobody's: the last step was the other one's */
        if (thread == 0) store_wait_read();
    }
    if (p.cluster > 1) cluster_barrier(); /* nobody leaves while others still report to its barriers */
}

/* ---- launch ---------------------------------------------------------------------------------------------------- */

/* From row to row, as a tensor map may have it; 0 if there is no such stride. */
int64_t row_stride(const mv_task *task, mv_rows rows, int64_t columns) {
    if (task->tokens == 1) return ceil_div(columns, 8) * 8;
    const bool one = task->inner >= task->tokens || rows.outer_stride == task->inner * rows.inner_stride;
    const int64_t stride = task->inner == 1 ? rows.outer_stride : rows.inner_stride;
    return one && stride >= columns ? stride : 0;
}

/* The second launch: x is y. rest: the norm of those rows that the first launch leaves to this one. */
struct Rest {
    mv_task norm;
    RowCounters counters;
};

/* Stages of the ring of 64 tokens, of which x has so many: at most one a step. Products read 64 rows from where the
 * last one begins. Where there are more steps than stages, every stage has to be the same warpgroup's in each round: a
 * wait knows a round by its parity, and so cannot tell it from the one two rounds before. */
template <typename Tile> int few_stages(int high, int steps) {
    const int bytes = high * kRowBytes + Tile::w_bytes, past = Tile::x_bytes > bytes ? Tile::x_bytes - bytes : 0;
    const int fit = min((Tile::ring_bytes - past) / bytes, kMaxStages) / Tile::step_turns * Tile::step_turns;
    return min(fit, max(steps, Tile::step_turns));
}

/* Steps of weights that are asked for before the tokens, which must not come later: memory answers in order. All for
 * very few tokens of a long hidden, and of weights so small that they are there at once; few of narrow tiles. */
template <typename Tile> int early_steps(const WgmmaProduct &p) {
    constexpr int kFew = (Tile::N < 64 ? 2 * Tile::N - 32 : 96) << 10, kMany = 44 << 10;
    constexpr int kEarlyBytes = Tile::shared_steps ? kFew : kMany, kLeast = 3, kLongSteps = 48, kSmallBytes = 2 << 20;
    const bool all = Tile::shared_steps ? p.tokens <= kVeryFew && p.steps >= kLongSteps
                                        : int64_t{p.stages} * Tile::w_bytes * p.columns <= kSmallBytes;
    return all ? p.stages : max(kEarlyBytes / Tile::w_bytes, kLeast);
}

template <typename T, typename Tile>
mv_status launch_wgmma_tile(const mv_task *task, const WgmmaTileChoice &choice, const Rest &rest, mv_error *error) {
    constexpr bool kInOut = Tile::in_out;
    WgmmaProduct p = {};
    p.out = task->out;
    p.inner = task->inner;
    p.tokens = task->tokens;
    p.steps = static_cast<int>(ceil_div(task->hidden, kStep));
    p.cluster = choice.cluster;
    p.norm = rest.norm;
    p.counters = rest.counters;
    p.group = group_height(task, choice);
    p.static_weights = task->static_weights;
    p.addend = task->linear.addend;
    p.scale = task->linear.scale;
    p.once = !mv_rounds_each_step(task->rounding);
    /* Tiles read whole rows of y behind the last one, and a lone row of tiles what shared memory held behind its
     * tokens; what comes of either is not stored. */
    p.box_rows = task->tokens < Tile::M ? static_cast<int>(task->tokens) : Tile::M;
    p.high = (p.box_rows + 7) / 8 * 8;
    p.stages = Tile::shared_steps ? few_stages<Tile>(p.high, p.steps) : Tile::stages;
    const int64_t rows = task->x.data == task->workspace ? padded_tokens(task) : task->tokens;
    p.last_token = static_cast<int>(rows) - p.box_rows;
    const BoxedMatrix y = {task->x.data, task->dtype, rows, task->hidden, task->hidden, p.box_rows, kStep};
    const int64_t hidden = task->hidden, stride = row_stride(task, task->x, hidden);
    const BoxedMatrix x = {task->x.data, task->dtype, task->tokens, hidden, stride, p.box_rows, kStep};
    const BoxedMatrix norm_weight = {task->norm.weight, task->dtype, 1, hidden, ceil_div(hidden, 8) * 8, 1, kStep};
    mv_status status = encode_map(&p.x, Tile::late ? x : y, error);
    if (Tile::late && status == MV_OK) status = encode_map(&p.norm_weight, norm_weight, error);

    /* Do all rows of out begin at multiples of 16 bytes, one stride apart? */
    const mv_rows out = task->out;
    const int64_t out_stride = row_stride(task, out, task->linear.outputs / (Tile::gated ? 2 : 1));
    p.out_boxes = !Tile::shared_steps && fits_map(out.data, out_stride, task->tokens);
    int64_t first = 0;
    for (int i = 0; i < 3 && first < task->linear.outputs; i++) {
        const mv_block &block = task->linear.block[i];
        Segment &segment = p.segment[i];
        segment.outputs = static_cast<int>(task->linear.packed ? task->linear.outputs : block.outputs);
        segment.tiles = static_cast<unsigned>(ceil_div(segment.outputs, Tile::columns));
        segment.bias = block.bias;
        segment.bias_dtype = block.bias_dtype;
        segment.first_output = first;
        if (segment.outputs == 0) continue;
        const BoxedMatrix weight =
            kInOut ? BoxedMatrix{block.weight,
                                 task->dtype,
                                 task->hidden,
                                 segment.outputs,
                                 block.col_stride,
                                 kStep / static_cast<int>(p.cluster),
                                 kStep}
                   : BoxedMatrix{block.weight,
                                 task->dtype,
                                 segment.outputs,
                                 task->hidden,
                                 block.row_stride,
                                 Tile::gated ? Tile::columns : Tile::N / static_cast<int>(p.cluster),
                                 kStep};
        if (status == MV_OK) status = encode_map(&p.weight[i], weight, error);
        if (first % 8 != 0 || segment.outputs % 8 != 0) p.out_boxes = false; /* copies store whole 16 bytes */
        first += segment.outputs;
    }
    for (int i = 0; i < 3; i++) {
        const Segment &segment = p.segment[i];
        if (!p.out_boxes || segment.outputs == 0 || (Tile::gated && i > 0)) continue;
        BoxedMatrix to = {static_cast<uint16_t *>(out.data) + segment.first_output,
                          task->dtype,
                          task->tokens,
                          segment.outputs,
                          out_stride,
                          64,
                          kBoxColumns};
        if (status == MV_OK) status = encode_map(&p.box[i], to, error);
        to.box_columns = kNarrowColumns;
        if (Tile::wide_boxes < Tile::boxes && status == MV_OK) status = encode_map(&p.narrow_box[i], to, error);
    }
    if (status != MV_OK) return status;

    p.rows = static_cast<unsigned>(ceil_div(task->tokens, Tile::M * p.cluster));
    p.columns = static_cast<unsigned>(block_columns(task, Tile::N));
    p.early = early_steps<Tile>(p);
    const int64_t clusters = int64_t{p.rows} * p.columns, at_once = task->sm_count / p.cluster;
    /* What 128 tokens leave is room for the next call's norm; 64 gain more by what else could be on its way. */
    const int smem_bytes = Tile::shared_steps ? kSmemBytes : Tile::ring_at + Tile::stages * Tile::stage_bytes;
    const int threads = Tile::trades_registers || choice.meanwhile ? kMostThreads : kFewestThreads;
    Grid grid = {static_cast<unsigned>((clusters < at_once ? clusters : at_once) * p.cluster),
                 static_cast<unsigned>(threads), static_cast<size_t>(smem_bytes)};
    grid.cluster = p.cluster;
    return launch<wgmma_kernel<T, Tile>>(task, grid, error, p);
}

template <typename T, Sharing kSharing, WgmmaForm kForm, int... kOutputs>
mv_status launch_wgmma_one_of(const mv_task *task, const WgmmaTileChoice &choice, const Rest &rest, mv_error *error) {
    mv_status status = MV_OK;
    const auto launch = [&](int outputs,
                            mv_status (*tile)(const mv_task *, const WgmmaTileChoice &, const Rest &, mv_error *)) {
        if (outputs == choice.outputs) status = tile(task, choice, rest, error);
    };
    (launch(kOutputs, launch_wgmma_tile<T, WgmmaTile<kSharing, kOutputs, kForm>>), ...);
    return status;
}

/* Every tile that choose_wgmma_tile may choose; kTurned: the form for in_out weights. */
template <typename T, WgmmaForm kPlain, WgmmaForm kTurned>
mv_status launch_choice(const mv_task *task, const WgmmaTileChoice &choice, const Rest &rest, mv_error *error) {
    constexpr Sharing kTokens = Sharing::kTokens;
    if (task->linear.block[0].col_stride != 1)
        return launch_wgmma_one_of<T, kTokens, kTurned, 128, 256>(task, choice, rest, error);
    switch (choice.sharing) {
    case Sharing::kTiles:
        return launch_wgmma_tile<T, WgmmaTile<Sharing::kTiles, kWholeOutputs, kPlain>>(task, choice, rest, error);
    case Sharing::kSteps:
        return launch_wgmma_one_of<T, Sharing::kSteps, kPlain, 32, 48, 64, 80, 96>(task, choice, rest, error);
    default:
        return launch_wgmma_one_of<T, kTokens, kPlain, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256>(
            task, choice, rest, error);
    }
}

/* The same of a gated layer. */
template <typename T>
mv_status launch_gated(const mv_task *task, const WgmmaTileChoice &choice, const Rest &rest, mv_error *error) {
    switch (choice.sharing) {
    case Sharing::kTiles:
        return launch_wgmma_one_of<T, Sharing::kTiles, WgmmaForm::kGated, kNarrowWholeOutputs, kWholeOutputs>(
            task, choice, rest, error);
    case Sharing::kSteps:
        return launch_wgmma_one_of<T, Sharing::kSteps, WgmmaForm::kGated, 32, 64, 96>(task, choice, rest, error);
    default:
        return launch_wgmma_one_of<T, Sharing::kTokens, WgmmaForm::kGated, 64, 96, 128, 160, 192, 224, 256>(
            task, choice, rest, error);
    }
}

/* One launch: x is read as it is. */
mv_status launch_late(const mv_task *task, const WgmmaTileChoice &choice, mv_error *error) {
    return launch_wgmma_one_of<__nv_bfloat16, Sharing::kTokens, WgmmaForm::kLate, 64, 96, 128, 160, 192, 224, 256>(
        task, choice, {*task, {nullptr, INT32_MAX}}, error);
}

size_t padded_y_bytes(const mv_task *task) {
    return static_cast<size_t>(padded_tokens(task)) * static_cast<size_t>(task->hidden) * mv_dtype_bytes(task->dtype);
}

/* The norm kernel writes the rows of the first wave of tiles, which would otherwise wait; the product's spare warps
 * write the others while the tensor cores work. */
template <typename T>
mv_status plan(const mv_task *task, const mv_decision *decision, mv_kernel *norm, mv_error *error) {
    PlanTasks tasks = plan_tasks(task);
    const WgmmaTileChoice choice = cut_of<WgmmaTileChoice>(decision);
    Rest rest = {tasks.norm, {nullptr, INT32_MAX}};
    if (choice.meanwhile) {
        const int64_t first = first_rows(task, choice);
        tasks.norm.tokens = first;
        tasks.norm.next.counters =
            reinterpret_cast<uint32_t *>(static_cast<char *>(task->workspace) + padded_y_bytes(task));
        tasks.norm.next.counter_count = static_cast<int64_t>(row_counters(task->tokens));
        rest.counters = {tasks.norm.next.counters, static_cast<int>(first)};
    }
    const mv_status status = reads_x(task) ? MV_OK : make_y(&tasks.norm, decision, norm, error);
    if (status != MV_OK) return status;
    if (task->linear.gated) return launch_gated<T>(&tasks.product, choice, rest, error);
    return task->linear.addend.data
               ? launch_choice<T, WgmmaForm::kAdds, WgmmaForm::kAddsInOut>(&tasks.product, choice, rest, error)
               : launch_choice<T, WgmmaForm::kPlain, WgmmaForm::kInOut>(&tasks.product, choice, rest, error);
}

const char *plan_why_not(const mv_task *task) {
    if (task->linear.gated && task->linear.block[0].col_stride != 1)
        return "it takes a gated layer's weights as nn.Linear keeps them, not a transposed copy";
    if (task->smem_bytes < kSmemBytes) return "there is too little shared memory";
    if (const char *reason = mv_tensor_cores_why_not(task)) return reason;
    if (task->tokens > INT32_MAX - 256 || task->hidden > INT32_MAX - 256 || task->linear.outputs > INT32_MAX - 256)
        return "a tensor map has coordinates of 32 bits";
    if (ceil_div(task->tokens, 64) * block_columns(task, 64) > INT32_MAX)
        return "there are more tiles than one launch can take";
    for (const mv_block &block : task->linear.block) {
        const bool out_in = block.col_stride == 1;
        if (block.outputs > 0 && !fits_map(block.weight, out_in ? block.row_stride : block.col_stride, 1))
            return "the weight's stride is more than a tensor map can hold";
        if (task->linear.packed) break;
    }
    return nullptr;
}

const char *late_why_not(const mv_task *task) {
    if (const char *reason = plan_why_not(task)) return reason;
    if (mv_rounds_each_step(task->rounding))
        return "it takes rounding=\"fp32\" alone, since the row factor joins after the products";
    if (task->norm.residual.data) return "it takes no residual";
    if (task->norm.weight_offset != 0 || task->norm.weight_dtype != task->dtype || !is_aligned16(task->norm.weight))
        return "it takes norm weights of x's dtype, 16-byte aligned, and no weight_offset";
    if (task->linear.block[0].col_stride != 1)
        return "it takes weights as nn.Linear keeps them or their .t(), not a transposed copy";
    if (!fits_map(task->x.data, row_stride(task, task->x, task->hidden), task->tokens))
        return "it takes rows of x that are 16-byte aligned and one stride apart";
    return nullptr;
}

/* As against the plan; twice as much where it cannot serve, or has no tiles for so few tokens. */
double late_us(const mv_task *task, const WgmmaTileChoice &choice) {
    if (mv_rounds_each_step(task->rounding) || task->tokens <= 64) return 2 * prices::norm_wgmma_least_us(task);
    const WgmmaTileChoice plan = choose_wgmma_tile(task);
    return wgmma_plan_us(task, plan) * choice.us / (plan.us + prices::kHop);
}

} // namespace

/* ---- the rows -------------------------------------------------------------------------------------------------- */

extern "C" {
mv_kernel mv_rms_norm_f16_sm80, mv_rms_norm_bf16_sm80;

const char *mv_norm_wgmma_sm90a_decide(const mv_task *task, double below, mv_decision *decision) {
    if (!mv_at_price(decision, prices::norm_wgmma_least_us(task), below)) return mv_too_dear;
    if (const char *reason = plan_why_not(task)) return reason;
    const WgmmaTileChoice choice = choose_wgmma_tile(task);
    if (!mv_at_price(decision, wgmma_plan_us(task, choice), below)) return mv_too_dear;
    if (!reads_x(task)) decision->workspace = padded_y_bytes(task) + row_counters(task->tokens) * sizeof(uint32_t);
    keep_cut(decision, choice);
    return nullptr;
}

const char *mv_wgmma_sm90a_decide(const mv_task *task, double below, mv_decision *decision) {
    const WgmmaTileChoice choice = choose_late_tile(task);
    if (!mv_at_price(decision, late_us(task, choice), below)) return mv_too_dear;
    if (const char *reason = norm_linear_why_not(task)) return reason;
    keep_cut(decision, choice);
    return late_why_not(task);
}

mv_status mv_linear_bf16_wgmma_sm90a(const mv_task *task, const mv_decision *decision, mv_error *error) {
    return launch_late(task, cut_of<WgmmaTileChoice>(decision), error);
}

mv_status mv_linear_f16_norm_wgmma_sm90a(const mv_task *task, const mv_decision *decision, mv_error *error) {
    return plan<__half>(task, decision, mv_rms_norm_f16_sm80, error);
}

mv_status mv_linear_bf16_norm_wgmma_sm90a(const mv_task *task, const mv_decision *decision, mv_error *error) {
    return plan<__nv_bfloat16>(task, decision, mv_rms_norm_bf16_sm80, error);
}
}

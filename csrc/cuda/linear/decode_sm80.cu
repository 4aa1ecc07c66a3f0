/* decode_sm80.cu: RMSNorm and the projection for a few tokens, in one kernel, at the speed of memory.
 *
 * At decode the weights move through the chip once and everything else must hide behind that. One block per SM takes
 * an even share of the rows of the weight; its rows, end to end, are cut into steps of kUnroll packets of 16 bytes per
 * lane, and each warp takes an even share of the steps: no warp idles while others work. A row that a warp begins and
 * another one ends is put together in shared memory. Two steps are always on their way (more are no faster: a warp has
 * six scoreboards, and loads that share one are waited for together); the first two are asked for before the wait for
 * the previous kernel where static_weights allows it, else L2 is.
 *
 * Meanwhile the block normalises the tokens once and keeps them as float32 in shared memory: y exactly, after a
 * barrier that makes the row factor known; in "fp32" s * w without a rounding, and the row factor multiplies the
 * finished sum, which saves that barrier. Without a norm x itself goes there, and an addend comes with the last step of
 * its row, as the bias does. The rows of the gate and of up take turns in a gated layer; their finished sums wait in
 * shared memory until the block has all of its own. Sums are float32, each lane's in order of k, then over lanes in a
 * fixed tree. */
#include "cuda/arch/launch.cuh"
#include "cuda/arch/reduce.cuh"
#include "cuda/cuda.h"
#include "cuda/linear/epilogue.cuh"
#include "cuda/norm/rms_norm.cuh"
#include "cuda/prices/linear.cuh"

namespace {

constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kUnroll = 4; /* packets per lane in a step: two steps of 16 warps are 64 KB on their way to an SM */
constexpr int kMaxTokens = 4;

/* ---- the tokens, in shared memory ----------------------------------------------------------------------------- */

/* A lane multiplies 16 bytes of weights, 4 or 8 of them, by as many values. For 8 a token is kept as two planes, the
 * low and the high half of every 8 values: then neighbouring lanes read neighbouring 16 bytes, and no bank twice. */
template <int kSize> struct Tokens {
    float *y;
    int stride; /* between tokens: the hidden size rounded up to whole steps; zeros follow it */

    /* The 4 values from column k + part on; k is a multiple of kSize. */
    __device__ __forceinline__ float4 *quad(int token, int k, int part) const {
        float *row = y + token * stride;
        return reinterpret_cast<float4 *>(kSize == 4 ? row + k + part : row + part / 4 * (stride / 2) + k / 2u);
    }
};

/* Columns of a row that a warp covers in a step: kUnroll packets per lane. */
template <typename W> constexpr int kColumns = 32 * kUnroll *Packet<W>::size;

template <typename W> int padded(int64_t hidden) {
    return static_cast<int>((hidden + kColumns<W> - 1) / kColumns<W> * kColumns<W>);
}

constexpr int kPartials = kMaxTokens * kWarps;

/* gated_rows: of a block of a gated layer, else 0. */
template <typename W> size_t decode_shared_bytes(int tokens, int64_t hidden, int gated_rows) {
    const size_t of_token = static_cast<size_t>(padded<W>(hidden)) + static_cast<size_t>(gated_rows);
    return (2 * kPartials + static_cast<size_t>(tokens) * of_token) * sizeof(float);
}

struct Aligned {
    bool rows, norm_weight; /* fit for 16-byte accesses */
};

/* The same of tokens that are multiplied as they are. */
template <typename T, int kTokens, int kSize> __device__ __forceinline__ void
widen_tokens(const mv_task &task, int64_t first_token, Aligned aligned, const Tokens<kSize> &tokens) {
    constexpr int size = Packet<T>::size;
    for (int k = threadIdx.x * size; k < tokens.stride; k += kThreads * size)
#pragma unroll
        for (int t = 0; t < kTokens; t++) {
            const bool exists = first_token + t < task.tokens;
            const int64_t row = exists ? first_token + t : first_token, count = exists ? task.hidden - k : 0;
            const Packet<T> x = load_packet(row_address<const T>(task.x, task.inner, row) + k, count, aligned.rows);
#pragma unroll
            for (int i = 0; i < size; i += 4)
                *tokens.quad(t, k, i) = make_float4(x.get(i), x.get(i + 1), x.get(i + 2), x.get(i + 3));
        }
    __syncthreads();
}

/* Reads the tokens, adds the residual (block 0 writes the sum out), and leaves in shared memory what the weights are
 * multiplied by; gives the factors that are still to come after the sums. `near` are the norm weights of this thread's
 * first packet, loaded ahead of time. */
template <typename T, int kTokens, int kSize>
__device__ __forceinline__ void widen_normalised_tokens(const mv_task &task, int64_t first_token, Aligned aligned,
                                                        const NormWeights<T> &near, const Tokens<kSize> &tokens,
                                                        float *partial, float (&factor)[kTokens]) {
    constexpr int size = Packet<T>::size;
    constexpr int step = kThreads * size;
    const int first = threadIdx.x * size;
    const bool rounds = mv_rounds_each_step(task.rounding), twice = mv_norm_rounds_twice(task.rounding);
    const bool writes_sum = task.norm.residual_out.data && blockIdx.x == 0;
    const auto weights_at = [&](int k) {
        return k == first ? near : load_norm_weights<T>(task, k, aligned.norm_weight);
    };

    float squares[kTokens] = {};
    for (int k = first; k < tokens.stride; k += step) {
        const NormWeights<T> weights = weights_at(k);
#pragma unroll
        for (int t = 0; t < kTokens; t++) {
            const bool exists = first_token + t < task.tokens;
            const int64_t row = exists ? first_token + t : first_token, count = exists ? task.hidden - k : 0;
            Packet<T> s = load_packet(row_address<const T>(task.x, task.inner, row) + k, count, aligned.rows);
            if (task.norm.residual.data) {
                const T *residual = row_address<const T>(task.norm.residual, task.inner, row) + k;
                s = add_residual(s, load_packet(residual, count, aligned.rows));
                if (writes_sum)
                    store_packet(row_address<T>(task.norm.residual_out, task.inner, row) + k, s, count, aligned.rows);
            }
            float value[size];
#pragma unroll
            for (int i = 0; i < size; i++) {
                value[i] = s.get(i);
                squares[t] = fmaf(value[i], value[i], squares[t]);
                if (!rounds) value[i] *= weights.v[i];
            }
#pragma unroll
            for (int i = 0; i < size; i += 4)
                *tokens.quad(t, k, i) = make_float4(value[i], value[i + 1], value[i + 2], value[i + 3]);
        }
    }

#pragma unroll
    for (int t = 0; t < kTokens; t++) {
        const float sum = warp_sum(squares[t]);
        if (threadIdx.x % 32 == 0) partial[t * kWarps + threadIdx.x / 32] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < kTokens; t++) {
        float sum = 0;
#pragma unroll
        for (int warp = 0; warp < kWarps; warp++) sum += partial[t * kWarps + warp];
        factor[t] = row_factor<T>(sum, task);
    }
    if (!rounds) return;

    /* Each thread finishes the values that it put there itself. */
    for (int k = first; k < tokens.stride; k += step) {
        const NormWeights<T> weights = weights_at(k);
#pragma unroll
        for (int t = 0; t < kTokens; t++) {
#pragma unroll
            for (int i = 0; i < size; i += 4) {
                float4 *quad = tokens.quad(t, k, i);
                const float4 s = *quad;
                *quad = make_float4(round_to<T>(apply_norm<T>(s.x, factor[t], weights.v[i + 0], twice)),
                                    round_to<T>(apply_norm<T>(s.y, factor[t], weights.v[i + 1], twice)),
                                    round_to<T>(apply_norm<T>(s.z, factor[t], weights.v[i + 2], twice)),
                                    round_to<T>(apply_norm<T>(s.w, factor[t], weights.v[i + 3], twice)));
            }
        }
    }
#pragma unroll
    for (int t = 0; t < kTokens; t++) factor[t] = 1;
    __syncthreads();
}

/* ---- the weights, on their way through registers ---------------------------------------------------------------- */

/* Where a warp is: in row n, at column k, with so many steps to go. */
struct WeightPlace {
    int n, k, left;
};

/* The even split of the rows over the blocks, in units of one row, or of two in a gated layer: the first `more` blocks
 * have one more. */
struct RowSplit {
    int units_per_block, more, unit, steps_per_row; /* a row is steps_per_row * kColumns<W> wide, padding included */
};

int rows_of_block(const RowSplit &split) { return (split.units_per_block + (split.more > 0)) * split.unit; }

__device__ __forceinline__ int share_begin(int each, int more, int part) { return part * each + min(part, more); }

template <typename W, bool kAligned> struct WeightStream {
    static constexpr int size = Packet<W>::size;
    static constexpr int columns = kColumns<W>;

    const mv_task &task;
    const int hidden, first_row, rows, steps_per_row, steps; /* of this block */

    __device__ __forceinline__ WeightStream(const mv_task &task, RowSplit split)
        : task(task), hidden(static_cast<int>(task.hidden)),
          first_row(split.unit * share_begin(split.units_per_block, split.more, blockIdx.x)),
          rows(split.unit * (split.units_per_block + (static_cast<int>(blockIdx.x) < split.more))),
          steps_per_row(split.steps_per_row), steps(rows * split.steps_per_row) {}

    /* The steps of warp w are those from begin(w) to begin(w + 1). */
    __device__ __forceinline__ int begin(int warp) const { return share_begin(steps / kWarps, steps % kWarps, warp); }

    __device__ __forceinline__ WeightPlace first() const {
        const int warp = threadIdx.x / 32, step = begin(warp), row = step / steps_per_row;
        return {first_row + row, (step - row * steps_per_row) * columns, begin(warp + 1) - step};
    }
    /* The warp that multiplies the last columns of row n. */
    __device__ __forceinline__ int last_warp(int n) const {
        const int row_end = (n - first_row + 1) * steps_per_row;
        int warp = threadIdx.x / 32;
        while (begin(warp + 1) < row_end) warp++;
        return warp;
    }
    __device__ __forceinline__ bool ends_row(WeightPlace p) const { return p.k + columns >= hidden; }
    __device__ __forceinline__ WeightPlace next(WeightPlace p) const {
        if (ends_row(p)) return {p.n + 1, 0, p.left - 1};
        return {p.n, p.k + columns, p.left - 1};
    }
    __device__ __forceinline__ int column(WeightPlace p, int u) const {
        return p.k + (u * 32 + static_cast<int>(threadIdx.x % 32)) * size;
    }

    /* The row that p is in; null past the warp's last step. */
    __device__ __forceinline__ const W *row(WeightPlace p) const {
        return p.left > 0 ? weight_row<W>(task, find_output(task, p.n)) : nullptr;
    }
    /* Has L2 bring what a step at p loads. */
    __device__ __forceinline__ void prefetch(WeightPlace p) const {
        if (threadIdx.x % 32 == 0 && p.left > 0)
            prefetch_l2(row(p) + p.k, min(columns, hidden - p.k) * static_cast<int>(sizeof(W)));
    }
    template <typename T> __device__ __forceinline__ float bias(WeightPlace p) const {
        return p.left > 0 ? load_bias<T>(task, find_output(task, p.n)) : 0.0f;
    }
    /* Of this lane's token, in the row that ends at p; 0 where there is none. */
    template <typename T, int kTokens>
    __device__ __forceinline__ float addend(WeightPlace p, int64_t first_token) const {
        const int lane = threadIdx.x % 32;
        const bool wanted = task.linear.addend.data && p.left > 0 && ends_row(p) && lane < kTokens;
        return wanted && first_token + lane < task.tokens ? load_addend<T>(task, first_token + lane, p.n) : 0.0f;
    }
    __device__ __forceinline__ Packet<W> load(const W *row, int k) const {
        const bool wanted = row && k < hidden;
        if constexpr (kAligned) return as_packet<W>(load_streaming(row + k, wanted)); /* hidden is whole packets */
        return load_packet<W, Through::kL2>(row + k, wanted ? hidden - k : 0, false);
    }
};

/* One step on its way: what was asked for, and the bias and the addend of its row. */
template <typename W> struct Step {
    Packet<W> packets[kUnroll];
    float bias, addend;
};

template <typename W, int kTokens> __device__ __forceinline__ void
multiply_packet(const Packet<W> &weights, const Tokens<Packet<W>::size> &tokens, int k, float (&sum)[kTokens]) {
#pragma unroll
    for (int t = 0; t < kTokens; t++) {
#pragma unroll
        for (int part = 0; part < Packet<W>::size; part += 4) {
            const float4 y = *tokens.quad(t, k, part);
            sum[t] = fmaf(y.x, weights.get(part + 0), sum[t]);
            sum[t] = fmaf(y.y, weights.get(part + 1), sum[t]);
            sum[t] = fmaf(y.z, weights.get(part + 2), sum[t]);
            sum[t] = fmaf(y.w, weights.get(part + 3), sum[t]);
        }
    }
}

/* ---- the kernel ------------------------------------------------------------------------------------------------- */

template <typename T, typename W, bool kAligned>
__device__ __forceinline__ void ask_for(const WeightStream<W, kAligned> &stream, WeightPlace place, Step<W> &step) {
    const W *row = stream.row(place);
#pragma unroll
    for (int u = 0; u < kUnroll; u++) step.packets[u] = stream.load(row, stream.column(place, u));
    step.bias = stream.template bias<T>(place);
}

/* The row that a warp is adding up. */
template <int kTokens> struct RowSum {
    float sum[kTokens]; /* of this lane */
    bool whole;         /* the warp has it from its first column on */
};

/* Of a gated layer, whose finished sums of row n are those from n * kTokens on; else null. */
struct GatedSums {
    float *of;
};

/* kPlain: without a norm; only then there may be addends, and no gate. */
template <typename T, int kTokens, bool kPlain>
__device__ __forceinline__ void write_outputs(const mv_task &task, int64_t first_token, int n,
                                              const float (&total)[kTokens], const float (&factor)[kTokens], float bias,
                                              float addend, GatedSums gated) {
#pragma unroll
    for (int t = 0; t < kTokens; t++)
        if (static_cast<int>(threadIdx.x % 32) == t && first_token + t < task.tokens) {
            if (!kPlain && task.linear.gated) {
                gated.of[n * kTokens + t] = total[t] * factor[t] + bias;
                continue;
            }
            T *const to = row_address<T>(task.out, task.inner, first_token + t) + n;
            if constexpr (kPlain)
                *to = finish_output<T>(task, total[t], bias, addend);
            else
                *to = finish_output<T>(total[t] * factor[t], bias);
        }
}

/* Multiplies a step, each packet replaced as soon as it is used by one of the step `later`. At the end of a row that
 * the warp has had from its beginning the outputs are written; the end of another warp's row goes to `open`. */
template <typename T, bool kPlain, typename W, bool kAligned, int kTokens>
__device__ __forceinline__ void advance(const WeightStream<W, kAligned> &stream, const Tokens<Packet<W>::size> &tokens,
                                        Step<W> &step, WeightPlace done, WeightPlace later, int64_t first_token,
                                        const float (&factor)[kTokens], RowSum<kTokens> &row, float *open,
                                        GatedSums gated) {
    const float bias = step.bias, addend = kPlain ? step.addend : 0.0f;
    const W *next_row = stream.row(later);
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
        multiply_packet<W, kTokens>(step.packets[u], tokens, stream.column(done, u), row.sum);
        step.packets[u] = stream.load(next_row, stream.column(later, u));
    }
    step.bias = stream.template bias<T>(later);
    if constexpr (kPlain) step.addend = stream.template addend<T, kTokens>(later, first_token);
    if (done.left > 1 && !stream.ends_row(done)) return;

    const bool ends = stream.ends_row(done);
    if (row.whole && !ends) return; /* stays in row.sum, for close_row */
    float total[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; t++) {
        total[t] = warp_sum(row.sum[t]);
        if (!row.whole) open[t * kWarps + threadIdx.x / 32] = total[t];
        row.sum[t] = 0;
    }
    if (row.whole)
        write_outputs<T, kTokens, kPlain>(stream.task, first_token, done.n, total, factor, bias, addend, gated);
    row.whole = ends;
}

/* The row that this warp has begun and others have ended: their parts come from `open`. */
template <typename T, bool kPlain, typename W, bool kAligned, int kTokens>
__device__ __forceinline__ void close_row(const WeightStream<W, kAligned> &stream, int64_t first_token, int n,
                                          const float (&factor)[kTokens], const RowSum<kTokens> &row, const float *open,
                                          GatedSums gated) {
    float total[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; t++) total[t] = warp_sum(row.sum[t]);
    const int last = stream.last_warp(n);
    for (int warp = threadIdx.x / 32 + 1; warp <= last; warp++)
#pragma unroll
        for (int t = 0; t < kTokens; t++) total[t] += open[t * kWarps + warp];
    const float bias = load_bias<T>(stream.task, find_output(stream.task, n));
    const float addend =
        kPlain ? stream.template addend<T, kTokens>(WeightPlace{n, stream.hidden, 1}, first_token) : 0.0f;
    write_outputs<T, kTokens, kPlain>(stream.task, first_token, n, total, factor, bias, addend, gated);
}

/* The outputs of a gated layer, when all sums of the block are there. */
template <typename T, int kTokens> __device__ __forceinline__ void
write_gated(const mv_task &task, int64_t first_token, int first_row, int rows, GatedSums gated) {
    for (int i = threadIdx.x; i < rows / 2 * kTokens; i += kThreads) {
        const int t = i % kTokens, gate = first_row + i / kTokens * 2;
        const float *sums = gated.of + gate * kTokens + t;
        if (first_token + t < task.tokens)
            row_address<T>(task.out, task.inner, first_token + t)[gate / 2] =
                finish_gated<T>(task, sums[0], sums[kTokens]);
    }
}

template <typename T, typename W, bool kAligned, int kTokens, bool kPlain>
__global__ void __launch_bounds__(kThreads, 1)
    decode_sm80_kernel(const __grid_constant__ mv_task task, int64_t first_token, RowSplit split, Aligned aligned) {
    extern __shared__ float shared[];
    float *const open = shared + kPartials;
    const Tokens<Packet<W>::size> tokens = {shared + 2 * kPartials, split.steps_per_row * kColumns<W>};
    const WeightStream<W, kAligned> stream(task, split);
    const GatedSums gated = {tokens.y + kTokens * (tokens.stride - stream.first_row)};

    WeightPlace now = stream.first(), next = stream.next(now), last = now;
    RowSum<kTokens> row = {{}, now.k == 0};
    Step<W> even, odd;
    if (!task.static_weights) {
        stream.prefetch(now);
        stream.prefetch(next);
        prefetch_norm_weight(task);
        griddepcontrol_wait();
    }
    ask_for<T>(stream, now, even);
    ask_for<T>(stream, next, odd);
    [[maybe_unused]] NormWeights<T> near;
    if constexpr (!kPlain)
        near = load_norm_weights<T, Through::kL2>(task, threadIdx.x * Packet<T>::size, aligned.norm_weight);
    if (now.left == 0 && threadIdx.x % 32 < kTokens) open[threadIdx.x % 32 * kWarps + threadIdx.x / 32] = 0;
    griddepcontrol_wait();
    griddepcontrol_launch(); /* not earlier: kernels further down the stream would pile up on some of the SMs */

    float factor[kTokens];
    if constexpr (kPlain) {
        even.addend = stream.template addend<T, kTokens>(now, first_token);
        odd.addend = stream.template addend<T, kTokens>(next, first_token);
        widen_tokens<T, kTokens>(task, first_token, aligned, tokens);
    } else {
        widen_normalised_tokens<T, kTokens>(task, first_token, aligned, near, tokens, shared, factor);
    }

    const auto multiply_step = [&](Step<W> &step) {
        const WeightPlace later = stream.next(next);
        advance<T, kPlain>(stream, tokens, step, now, later, first_token, factor, row, open, gated);
        last = now;
        now = next;
        next = later;
    };
    while (now.left > 0) {
        multiply_step(even);
        if (now.left > 0) multiply_step(odd);
    }
    const bool has_gate = !kPlain && task.linear.gated;
    if (stream.steps_per_row == 1 && !has_gate) return;
    __syncthreads();
    if (last.left == 1 && row.whole && !stream.ends_row(last))
        close_row<T, kPlain>(stream, first_token, last.n, factor, row, open, gated);
    if (!has_gate) return;
    __syncthreads();
    write_gated<T, kTokens>(task, first_token, stream.first_row, stream.rows, gated);
}

/* ---- launchers ------------------------------------------------------------------------------------------------ */

/* Are all rows of the weight fit for 16-byte loads, to their last value? */
template <typename W> bool weights_aligned(const mv_task *task) {
    bool aligned = task->hidden % Packet<W>::size == 0;
    for (const mv_block &block : task->linear.block)
        if (block.outputs) aligned = aligned && is_aligned16(block.weight) && block.row_stride % Packet<W>::size == 0;
    return aligned;
}

template <typename W> RowSplit split_of(const mv_task *task) {
    const int unit = task->linear.gated ? 2 : 1, units = static_cast<int>(task->linear.outputs) / unit;
    return {units / task->sm_count, units % task->sm_count, unit, padded<W>(task->hidden) / kColumns<W>};
}

template <typename T, typename W, int kTokens, bool kPlain>
mv_status launch_decode_sm80(const mv_task *task, int64_t first_token, mv_error *error) {
    const RowSplit split = split_of<W>(task);
    const Aligned aligned = {norm_rows_aligned<T>(task), is_aligned16(task->norm.weight)};
    const Grid grid = {static_cast<unsigned>(task->sm_count), kThreads,
                       decode_shared_bytes<W>(kTokens, task->hidden, task->linear.gated ? rows_of_block(split) : 0)};
    return weights_aligned<W>(task)
               ? launch<decode_sm80_kernel<T, W, true, kTokens, kPlain>>(task, grid, error, *task, first_token, split,
                                                                         aligned)
               : launch<decode_sm80_kernel<T, W, false, kTokens, kPlain>>(task, grid, error, *task, first_token, split,
                                                                          aligned);
}

/* A few tokens at a time; each time the weights are read again. */
template <typename T, typename W, bool kPlain> mv_status decode_tokens(const mv_task *task, mv_error *error) {
    mv_status status = MV_OK;
    for (int64_t first = 0; first < task->tokens && status == MV_OK; first += kMaxTokens) {
        const int64_t count = task->tokens - first;
        if (count == 1)
            status = launch_decode_sm80<T, W, 1, kPlain>(task, first, error);
        else if (count == 2)
            status = launch_decode_sm80<T, W, 2, kPlain>(task, first, error);
        else
            status = launch_decode_sm80<T, W, kMaxTokens, kPlain>(task, first, error);
    }
    return status;
}

template <typename T, typename W> mv_status decode_of(const mv_task *task, mv_error *error) {
    return task->linear.plain_x ? decode_tokens<T, W, true>(task, error) : decode_tokens<T, W, false>(task, error);
}

template <typename T> mv_status decode_sm80(const mv_task *task, mv_error *error) {
    return task->linear.weight_dtype == MV_F32 ? decode_of<T, float>(task, error) : decode_of<T, T>(task, error);
}

} // namespace

extern "C" const char *mv_decode_sm80_decide(const mv_task *task, double below, mv_decision *decision) {
    if (!mv_at_price(decision, prices::decode_sm80_us(task), below)) return mv_too_dear;
    if (task->linear.block[0].col_stride != 1) return "it needs weights that are contiguous along the hidden size";
    if (task->linear.outputs > 1 << 24) return "it counts in 32 bits: there are too many outputs";
    if (task->hidden > 1 << 16) return "its tokens do not fit in shared memory";
    const int gated_rows = task->linear.gated ? rows_of_block(split_of<__half>(task)) : 0;
    if (decode_shared_bytes<__half>(kMaxTokens, task->hidden, gated_rows) > static_cast<size_t>(task->smem_bytes))
        return "its tokens do not fit in shared memory";
    return nullptr;
}

extern "C" mv_status mv_linear_f32_decode_sm80(const mv_task *task, const mv_decision *, mv_error *error) {
    return decode_sm80<float>(task, error);
}
extern "C" mv_status mv_linear_f16_decode_sm80(const mv_task *task, const mv_decision *, mv_error *error) {
    return decode_sm80<__half>(task, error);
}
extern "C" mv_status mv_linear_bf16_decode_sm80(const mv_task *task, const mv_decision *, mv_error *error) {
    return decode_sm80<__nv_bfloat16>(task, error);
}

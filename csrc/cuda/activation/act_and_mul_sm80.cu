/* act_and_mul_sm80.cu: silu_and_mul and gelu_and_mul at memory speed on everything from Ampere up.
 *
 * Memory decides: an output of 16 bits moves 6 bytes, for which an H200 takes as long as for 37 instructions, and silu
 * has 20 of them, gelu by tanh 23 (counted in the machine code). Only gelu by erf, with 68, is bound by arithmetic at
 * 16 bits. A row is cut into pieces, and a thread asks for all its packets of a piece, of gate and of up, before it
 * uses any. With 2 of each a thread, and at least 1024 threads on an SM, 64 KB or more are on their way there, which is
 * what the distance of memory takes. Where one of each puts all of x on its way at once, a thread takes one, so that a
 * small call spreads over more of the GPU. Blocks have as many threads as divide a row evenly; short rows share one.
 *
 * With expf, a reciprocal and normcdff a result keeps the precision of float32, also where it is tiny. Nothing is
 * loaded before the wait for the previous kernel, which may still write x. */
#include "cuda/activation/activation.cuh"
#include "cuda/arch/launch.cuh"
#include "cuda/arch/vec.cuh"

namespace {

constexpr int kMostThreads = 256;

/* What the kernel needs of a task, and how it is cut. */
struct Pieces {
    mv_rows x, out;
    int64_t inner, tokens, columns; /* columns: of gate, of up and of out */
    int threads, rows;              /* of a block: threads for each row's piece, and rows */
    int pieces;                     /* of a row; 1 where a block has several rows */
    bool rounds_activation;
    bool gate_aligned, up_aligned, out_aligned; /* fit for 16-byte accesses */
};

template <typename T, mv_activation kActivation>
__device__ __forceinline__ Packet<T> act_and_mul(const Packet<T> &gate, const Packet<T> &up, bool rounds) {
    float active[Packet<T>::size];
#pragma unroll
    for (int i = 0; i < Packet<T>::size; i++) active[i] = gate.get(i);
    activate<kActivation>(active);
    if constexpr (sizeof(T) == 2) {
        if (rounds) { /* float32 holds the product of two such values exactly, so one instruction rounds two of them */
            Packet<T> product = pack<T>(active);
#pragma unroll
            for (int w = 0; w < 4; w++) product.word[w] = multiply_pair<T>(product.word[w], up.word[w]);
            return product;
        }
    }
#pragma unroll
    for (int i = 0; i < Packet<T>::size; i++) active[i] *= up.get(i);
    return pack<T>(active);
}

/* kWhole: only whole packets, and all fit for 16-byte accesses. */
template <typename T, mv_activation kActivation, int kPackets, bool kWhole>
__global__ void __launch_bounds__(kMostThreads, 4) act_and_mul_kernel(const __grid_constant__ Pieces p) {
    constexpr int size = Packet<T>::size;
    const unsigned in_block = p.rows > 1 ? threadIdx.x / p.threads : 0, thread = threadIdx.x - in_block * p.threads;
    const unsigned block = p.pieces > 1 ? blockIdx.x / p.pieces : blockIdx.x, piece = blockIdx.x - block * p.pieces;
    const int64_t row = static_cast<int64_t>(block) * p.rows + in_block;
    const int64_t first = (static_cast<int64_t>(piece) * kPackets * p.threads + thread) * size;
    const int64_t left = row < p.tokens ? p.columns - first : 0; /* of the row, from this thread's first column on */
    const T *gate = nullptr, *up = nullptr;
    T *out = nullptr;
    if (left > 0) {
        gate = row_address<const T>(p.x, p.inner, row) + first;
        up = gate + p.columns;
        out = row_address<T>(p.out, p.inner, row) + first;
    }
    griddepcontrol_wait();
    griddepcontrol_launch();

    const int apart = p.threads * size;
    Packet<T> gates[kPackets], ups[kPackets];
#pragma unroll
    for (int i = 0; i < kPackets; i++) {
        if constexpr (kWhole) {
            gates[i] = as_packet<T>(load_past_l1(gate + i * apart, i * apart < left));
            ups[i] = as_packet<T>(load_past_l1(up + i * apart, i * apart < left));
        } else {
            gates[i] = load_packet(gate + i * apart, left - i * apart, p.gate_aligned);
            ups[i] = load_packet(up + i * apart, left - i * apart, p.up_aligned);
        }
    }
#pragma unroll
    for (int i = 0; i < kPackets; i++) {
        if (i * apart >= left) break;
        const Packet<T> product = act_and_mul<T, kActivation>(gates[i], ups[i], p.rounds_activation);
        store_packet(out + i * apart, product, kWhole ? size : left - i * apart, kWhole || p.out_aligned);
    }
}

/* ---- launchers ------------------------------------------------------------------------------------------------ */

template <typename T, mv_activation kActivation, int kPackets>
mv_status launch_pieces(const mv_task *task, Pieces p, mv_error *error) {
    const int64_t packets = (p.columns + Packet<T>::size - 1) / Packet<T>::size;
    const int64_t pieces = (packets + kMostThreads * kPackets - 1) / (kMostThreads * kPackets);
    p.threads = static_cast<int>((packets + pieces * kPackets - 1) / (pieces * kPackets));
    const int64_t fitting = pieces > 1 ? 1 : kMostThreads / p.threads, rows_of_sm = p.tokens / task->sm_count;
    p.rows = static_cast<int>(rows_of_sm < 1 ? 1 : rows_of_sm < fitting ? rows_of_sm : fitting);
    const int64_t groups = (p.tokens + p.rows - 1) / p.rows;
    if (pieces > INT32_MAX / groups)
        return mv_fail(
            error, MV_BAD_VALUE,
            "x has %lld rows of %lld columns, the CUDA kernels of silu_and_mul and gelu_and_mul take as many as 2^31 "
            "blocks have room for",
            static_cast<long long>(p.tokens), 2 * static_cast<long long>(p.columns));
    p.pieces = static_cast<int>(pieces);
    const Grid grid = {static_cast<unsigned>(groups * pieces), static_cast<unsigned>(p.threads * p.rows), 0};
    if (p.gate_aligned && p.up_aligned && p.out_aligned && p.columns % Packet<T>::size == 0)
        return launch<act_and_mul_kernel<T, kActivation, kPackets, true>>(task, grid, error, p);
    return launch<act_and_mul_kernel<T, kActivation, kPackets, false>>(task, grid, error, p);
}

/* Threads that an SM has room for: so many packets are on their way with one for each. */
constexpr int64_t kThreadsOfSm = 2048;

template <typename T, mv_activation kActivation>
mv_status launch_activation(const mv_task *task, const Pieces &p, mv_error *error) {
    const int64_t packets_of_all = (p.columns + Packet<T>::size - 1) / Packet<T>::size * p.tokens;
    if (packets_of_all <= kThreadsOfSm * task->sm_count) return launch_pieces<T, kActivation, 1>(task, p, error);
    return launch_pieces<T, kActivation, 2>(task, p, error);
}

template <typename T> mv_status act_and_mul(const mv_task *task, mv_error *error) {
    Pieces p = {};
    p.x = task->x;
    p.out = task->out;
    p.inner = task->inner;
    p.tokens = task->tokens;
    p.columns = task->hidden;
    p.rounds_activation = mv_rounds_each_step(task->rounding);
    p.gate_aligned = rows_aligned16(task->x, sizeof(T));
    p.up_aligned = p.gate_aligned && p.columns % Packet<T>::size == 0;
    p.out_aligned = rows_aligned16(task->out, sizeof(T));
    switch (task->activation) {
    case MV_SILU: return launch_activation<T, MV_SILU>(task, p, error);
    case MV_GELU_TANH: return launch_activation<T, MV_GELU_TANH>(task, p, error);
    case MV_GELU: return launch_activation<T, MV_GELU>(task, p, error);
    }
    return mv_fail(error, MV_BAD_VALUE, "act_and_mul: unknown activation");
}

} // namespace

extern "C" mv_status mv_act_and_mul_f32_sm80(const mv_task *task, const mv_decision *, mv_error *error) {
    return act_and_mul<float>(task, error);
}
extern "C" mv_status mv_act_and_mul_f16_sm80(const mv_task *task, const mv_decision *, mv_error *error) {
    return act_and_mul<__half>(task, error);
}
extern "C" mv_status mv_act_and_mul_bf16_sm80(const mv_task *task, const mv_decision *, mv_error *error) {
    return act_and_mul<__nv_bfloat16>(task, error);
}

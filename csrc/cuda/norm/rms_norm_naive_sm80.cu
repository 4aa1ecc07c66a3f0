/* rms_norm_naive_sm80.cu: the formula, written down: the first step of docs/rms_norm.md, kept to measure the others by.
 *
 * One block a row, one value a load, the row read twice, sums added in a tree in shared memory. Right for everything
 * that rms_norm_sm80.cu is right for, and never chosen unless asked for by name.
 */
#include "cuda/arch/launch.cuh"
#include "cuda/norm/rms_norm.cuh"

namespace {

constexpr int kThreads = 256;

template <typename T> __global__ void __launch_bounds__(kThreads)
    rms_norm_naive_kernel(const __grid_constant__ mv_task task) {
    __shared__ float sums[kThreads];
    griddepcontrol_wait();
    griddepcontrol_launch();

    const int64_t row = blockIdx.x;
    const T *x = row_address<const T>(task.x, task.inner, row);
    const T *residual = task.norm.residual.data ? row_address<const T>(task.norm.residual, task.inner, row) : nullptr;
    T *residual_out = task.norm.residual_out.data ? row_address<T>(task.norm.residual_out, task.inner, row) : nullptr;
    const T *added = task.norm.added.data ? row_address<const T>(task.norm.added, task.inner, row) : nullptr;
    T *out = row_address<T>(task.out, task.inner, row);
    const bool twice = mv_norm_rounds_twice(task.rounding), rounds = mv_rounds_each_step(task.rounding);

    float sum = 0;
    for (int64_t i = threadIdx.x; i < task.hidden; i += kThreads) {
        const T s = residual ? add_residual(x[i], residual[i]) : x[i];
        if (residual_out) residual_out[i] = s;
        sum += to_float(s) * to_float(s);
    }
    sums[threadIdx.x] = sum;
    for (int half = kThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    __syncthreads();
    const float r = row_factor<T>(sums[0], task);

    for (int64_t i = threadIdx.x; i < task.hidden; i += kThreads) {
        /* x may have been overwritten by residual_out: then that is where s is */
        const T s = residual_out ? residual_out[i] : residual ? add_residual(x[i], residual[i]) : x[i];
        const float own = task.norm.weight ? load_as<T>(task.norm.weight, task.norm.weight_dtype, i) : 1.0f;
        const float w = task.norm.weight_offset + own;
        float y = apply_norm<T>(to_float(s), r, w, twice);
        if (added) y = (rounds ? round_to<T>(y) : y) + to_float(added[i]);
        out[i] = from_float<T>(y);
    }
}

template <typename T> mv_status rms_norm_naive(const mv_task *task, mv_error *error) {
    if (task->tokens > INT32_MAX)
        return mv_fail(error, MV_BAD_VALUE, "rms_norm: x has %lld rows, this kernel takes fewer than 2^31",
                       static_cast<long long>(task->tokens));
    const Grid grid = {static_cast<unsigned>(task->tokens), kThreads, 0};
    return launch<rms_norm_naive_kernel<T>>(task, grid, error, *task);
}

} // namespace

extern "C" mv_status mv_rms_norm_f32_naive_sm80(const mv_task *task, const mv_decision *, mv_error *error) {
    return rms_norm_naive<float>(task, error);
}
extern "C" mv_status mv_rms_norm_f16_naive_sm80(const mv_task *task, const mv_decision *, mv_error *error) {
    return rms_norm_naive<__half>(task, error);
}
extern "C" mv_status mv_rms_norm_bf16_naive_sm80(const mv_task *task, const mv_decision *, mv_error *error) {
    return rms_norm_naive<__nv_bfloat16>(task, error);
}

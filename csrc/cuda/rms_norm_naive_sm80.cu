/* rms_norm_naive_sm80.cu: the formula, written down: the first step of docs/rms_norm.md, kept to measure the others by.
 *
 * One block a row, one value a load, the row read twice, sums added in a tree in shared memory. Right for everything
 * that rms_norm_sm80.cu is right for, and never chosen unless asked for by name.
 */
#include "launch.cuh"
#include "rms_norm.cuh"

namespace {

constexpr int kThreads = 256;

template <typename T> struct Naive {
    Rows<const T> x, residual;
    Rows<T> out, residual_out;
    const void *weight;
    int64_t inner, hidden;
    float eps, weight_offset;
    mv_dtype weight_dtype;
    bool hf;
};

template <typename T> __global__ void __launch_bounds__(kThreads) rms_norm_naive_kernel(Naive<T> n) {
    __shared__ float sums[kThreads];
    griddepcontrol_launch();
    griddepcontrol_wait();

    const int64_t row = blockIdx.x;
    const T *x = n.x.row(row, n.inner, false);
    const T *residual = n.residual.data ? n.residual.row(row, n.inner, false) : nullptr;
    T *residual_out = n.residual_out.data ? n.residual_out.row(row, n.inner, false) : nullptr;
    T *out = n.out.row(row, n.inner, false);

    float sum = 0;
    for (int64_t i = threadIdx.x; i < n.hidden; i += kThreads) {
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
    const float r = row_factor(sums[0], 1.0f / static_cast<float>(n.hidden), n.eps);

    for (int64_t i = threadIdx.x; i < n.hidden; i += kThreads) {
        /* x may have been overwritten by residual_out: then that is where s is */
        const T s = residual_out ? residual_out[i] : residual ? add_residual(x[i], residual[i]) : x[i];
        const float w = n.weight_offset + load_as<T>(n.weight, n.weight_dtype, i);
        out[i] = from_float<T>(apply_norm<T>(to_float(s), r, w, n.hf));
    }
}

template <typename T> mv_status rms_norm_naive(const mv_task *task, mv_error *error) {
    if (task->tokens > INT32_MAX)
        return mv_fail(error, MV_BAD_VALUE, "rms_norm: x has %lld rows, this kernel takes fewer than 2^31",
                       static_cast<long long>(task->tokens));
    const Naive<T> n = {as_rows<const T>(task->x),
                        as_rows<const T>(task->residual),
                        as_rows<T>(task->out),
                        as_rows<T>(task->residual_out),
                        task->norm_weight,
                        task->inner,
                        task->hidden,
                        task->eps,
                        task->weight_offset,
                        task->norm_weight_dtype,
                        task->rounding == MV_ROUNDING_HF};
    const Grid grid = {dim3(static_cast<unsigned>(task->tokens)), kThreads, 0};
    return launch<rms_norm_naive_kernel<T>>(task, grid, error, n);
}

} // namespace

extern "C" mv_status mv_rms_norm_f32_naive_sm80(const mv_task *task, mv_error *error) {
    return rms_norm_naive<float>(task, error);
}
extern "C" mv_status mv_rms_norm_f16_naive_sm80(const mv_task *task, mv_error *error) {
    return rms_norm_naive<__half>(task, error);
}
extern "C" mv_status mv_rms_norm_bf16_naive_sm80(const mv_task *task, mv_error *error) {
    return rms_norm_naive<__nv_bfloat16>(task, error);
}

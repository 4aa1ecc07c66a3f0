/* copy_rows.cu: the first launch of a plan without a norm, where the product cannot read x as it lies: rows that
 * are not 16-byte aligned, or apart; or where it takes float32 in two parts. A block copies a row. */
#include "cuda/arch/launch.cuh"
#include "cuda/linear/plan.cuh"
#include "cuda/norm/rms_norm.cuh"

namespace {

constexpr int kThreads = 256;

template <typename T> __global__ void __launch_bounds__(kThreads)
    copy_rows_kernel(const __grid_constant__ mv_task task, bool aligned) {
    constexpr int size = Packet<T>::size;
    if (task.next.launch_early) griddepcontrol_launch();
    griddepcontrol_wait();
    clear_counters(task);
    griddepcontrol_launch();
    const T *x = row_address<const T>(task.x, task.inner, blockIdx.x);
    T *out = row_address<T>(task.out, task.inner, blockIdx.x);
    for (int64_t at = threadIdx.x * size; at < task.hidden; at += kThreads * size) {
        const int64_t left = task.hidden - at;
        store_normalised(task, load_packet(x + at, left, aligned), [&](const Packet<T> &y, int64_t behind) {
            store_packet(out + behind + at, y, left, task.hidden % size == 0);
        });
    }
}

template <typename T> mv_status copy_rows(const mv_task *task, mv_error *error) {
    if (task->tokens > INT32_MAX) /* as many blocks as a grid may have */
        return mv_fail(error, MV_BAD_VALUE, "%s: x has %lld rows, the CUDA kernels take fewer than 2^31", task->op,
                       static_cast<long long>(task->tokens));
    const Grid grid = {static_cast<unsigned>(task->tokens), kThreads, 0};
    return launch<copy_rows_kernel<T>>(task, grid, error, *task, rows_aligned16(task->x, sizeof(T)));
}

} // namespace

extern "C" mv_status mv_copy_rows_sm80(const mv_task *task, const mv_decision *, mv_error *error) {
    return task->dtype == MV_F32   ? copy_rows<float>(task, error)
           : task->dtype == MV_F16 ? copy_rows<__half>(task, error)
                                   : copy_rows<__nv_bfloat16>(task, error);
}

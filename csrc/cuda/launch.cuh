/* launch.cuh: one way to launch a kernel: on the task's device and stream, with programmatic dependent launch where
 * the GPU has it, safe inside a stream capture even as the first call of the process. */
#pragma once

#include <cuda_runtime.h>

#include "../kernel.h"

static inline mv_status cuda_failed(mv_error *error, const char *what, cudaError_t status) {
    cudaGetLastError(); /* it is reported here; the next call must not see it again */
    return mv_fail(error, MV_DEVICE_ERROR, "%s: %s (%s)", what, cudaGetErrorString(status), cudaGetErrorName(status));
}

/* Makes `device` current, and on leave() what was current before. */
struct DeviceGuard {
    int previous, device;
    cudaError_t enter(int wanted) {
        device = wanted;
        cudaError_t status = cudaGetDevice(&previous);
        if (status == cudaSuccess && previous != device) status = cudaSetDevice(device);
        return status;
    }
    void leave() const {
        if (previous != device) cudaSetDevice(previous);
    }
};

/* Loading a kernel and raising its shared memory limit are not stream work, but a capture in its strictest mode forbids
 * loading; for this thread that check is lifted while we do it. */
static inline cudaError_t prepare_kernel(const void *kernel, int32_t device_smem_bytes) {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaError_t status = cudaThreadExchangeStreamCaptureMode(&mode);
    if (status != cudaSuccess) return status;
    cudaFuncAttributes attributes;
    status = cudaFuncGetAttributes(&attributes, kernel);
    if (status == cudaSuccess)
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      device_smem_bytes - static_cast<int32_t>(attributes.sharedSizeBytes));
    cudaThreadExchangeStreamCaptureMode(&mode);
    return status;
}

/* Which kernels are prepared on which device: a cache of what the driver knows, so races only repeat the work. */
constexpr int kMaxDevices = 64;
template <auto kernel> struct Prepared { static inline bool on[kMaxDevices]; };

struct Grid {
    dim3 blocks;
    unsigned threads;
    size_t smem_bytes;
    unsigned cluster; /* CTAs in a row that run together; 0: no clusters */
};

template <auto kernel, typename... Args>
static mv_status launch(const mv_task *task, Grid grid, mv_error *error, Args... args) {
    const void *function = reinterpret_cast<const void *>(kernel);
    const int device = task->device.index;
    DeviceGuard guard;
    cudaError_t status = guard.enter(device);
    if (status != cudaSuccess) return cuda_failed(error, "cudaSetDevice", status);

    bool *prepared = &Prepared<kernel>::on[device % kMaxDevices];
    if (device >= kMaxDevices || !__atomic_load_n(prepared, __ATOMIC_ACQUIRE)) {
        status = prepare_kernel(function, task->smem_bytes);
        __atomic_store_n(prepared, status == cudaSuccess, __ATOMIC_RELEASE);
    }

    if (status == cudaSuccess) {
        cudaLaunchAttribute attributes[2] = {};
        unsigned count = 0;
        if (task->programmatic_launch) {
            attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
            attributes[count++].val.programmaticStreamSerializationAllowed = 1;
        }
        if (grid.cluster > 1) {
            attributes[count].id = cudaLaunchAttributeClusterDimension;
            attributes[count].val.clusterDim.x = grid.cluster;
            attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
            count++;
        }
        cudaLaunchConfig_t config = {};
        config.gridDim = grid.blocks;
        config.blockDim = dim3(grid.threads);
        config.dynamicSmemBytes = grid.smem_bytes;
        config.stream = static_cast<cudaStream_t>(task->stream);
        config.attrs = attributes;
        config.numAttrs = count;
        void *pointers[] = {static_cast<void *>(&args)...};
        status = cudaLaunchKernelExC(&config, function, pointers);
    }
    guard.leave();
    return status == cudaSuccess ? MV_OK : cuda_failed(error, "kernel launch", status);
}

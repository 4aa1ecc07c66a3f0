/* launch.cuh: one way to launch a kernel: on the task's device and stream, with programmatic dependent launch where
 * the GPU has it, safe inside a stream capture even as the first call of the process. */
#pragma once

#include "cuda/arch/driver.cuh"
#include "kernel.h"

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

/* The driver's handle of a kernel on the current device, with its shared memory limit raised. Neither that nor loading
 * a kernel is stream work, but a capture in its strictest mode forbids loading; for this thread that check is lifted
 * while we do it. */
static inline cudaError_t prepare_kernel(const void *kernel, int32_t device_smem_bytes, cudaFunction_t *function) {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaError_t status = cudaThreadExchangeStreamCaptureMode(&mode);
    if (status != cudaSuccess) return status;
    cudaFuncAttributes attributes;
    status = cudaFuncGetAttributes(&attributes, kernel);
    if (status == cudaSuccess)
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      device_smem_bytes - static_cast<int32_t>(attributes.sharedSizeBytes));
    if (status == cudaSuccess && attributes.binaryVersion >= 90) /* clusters of 16, where a kernel has them */
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (status == cudaSuccess) status = cudaGetFuncBySymbol(function, kernel);
    cudaThreadExchangeStreamCaptureMode(&mode);
    return status;
}

/* The kernels that are prepared, by device: a cache of what the driver knows, so races only repeat the work. A handle
 * lives as long as the device's primary context: nothing of CUDA survives cudaDeviceReset, and this does not either. */
constexpr int kMaxDevices = 64;
template <auto kernel> struct Prepared { static inline cudaFunction_t on[kMaxDevices]; };

struct Grid {
    unsigned blocks, threads;
    size_t smem_bytes;
    unsigned cluster; /* CTAs in a row that run together; 0: no clusters */
};

/* By the driver, which is asked for less than the runtime does. False where it cannot: the runtime then makes the
 * context that this thread lacks, or says what is wrong. */
static inline bool launch_by_driver(const CUlaunchConfig &config, cudaFunction_t function, void **arguments) {
    static void *found;
    const auto launch =
        reinterpret_cast<PFN_cuLaunchKernelEx_v11060>(driver_function(&found, "cuLaunchKernelEx", 11060));
    return launch && launch(&config, function, arguments, nullptr) == CUDA_SUCCESS;
}

static inline cudaError_t launch_by_runtime(const CUlaunchConfig &of_driver, const void *kernel, void **arguments) {
    static_assert(sizeof(cudaLaunchAttribute) == sizeof(CUlaunchAttribute), "they are the same");
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(of_driver.gridDimX);
    config.blockDim = dim3(of_driver.blockDimX);
    config.dynamicSmemBytes = of_driver.sharedMemBytes;
    config.stream = of_driver.hStream;
    config.attrs = reinterpret_cast<cudaLaunchAttribute *>(of_driver.attrs);
    config.numAttrs = of_driver.numAttrs;
    return cudaLaunchKernelExC(&config, kernel, arguments);
}

/* Where and how: of a task, or of a launch that has none. */
struct Launch {
    int32_t device, smem_bytes; /* shared memory that a block of the device may ask for */
    void *stream;
    bool programmatic;
};

/* on: the kernel's handles by device. */
static inline mv_status launch_kernel(const void *kernel, cudaFunction_t *on, const Launch &how, const Grid &grid,
                                      void **arguments, mv_error *error) {
    DeviceGuard guard;
    cudaError_t status = guard.enter(how.device);
    if (status != cudaSuccess) return cuda_failed(error, "cudaSetDevice", status);

    cudaFunction_t *const prepared = how.device < kMaxDevices ? on + how.device : nullptr;
    cudaFunction_t function = prepared ? __atomic_load_n(prepared, __ATOMIC_ACQUIRE) : nullptr;
    if (!function) {
        status = prepare_kernel(kernel, how.smem_bytes, &function);
        if (status == cudaSuccess && prepared) __atomic_store_n(prepared, function, __ATOMIC_RELEASE);
    }

    if (status == cudaSuccess) {
        CUlaunchAttribute attributes[2] = {};
        unsigned count = 0;
        if (how.programmatic) {
            attributes[count].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes[count++].value.programmaticStreamSerializationAllowed = 1;
        }
        if (grid.cluster > 1) {
            attributes[count].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            attributes[count].value.clusterDim.x = grid.cluster;
            attributes[count].value.clusterDim.y = attributes[count].value.clusterDim.z = 1;
            count++;
        }
        CUlaunchConfig config = {};
        config.gridDimX = grid.blocks;
        config.blockDimX = grid.threads;
        config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1;
        config.sharedMemBytes = static_cast<unsigned>(grid.smem_bytes);
        config.hStream = static_cast<CUstream>(how.stream);
        config.attrs = attributes;
        config.numAttrs = count;
        if (!launch_by_driver(config, function, arguments)) status = launch_by_runtime(config, kernel, arguments);
    }
    guard.leave();
    return status == cudaSuccess ? MV_OK : cuda_failed(error, "kernel launch", status);
}

template <auto kernel, typename... Args>
static mv_status launch(const mv_task *task, Grid grid, mv_error *error, Args... args) {
    const Launch how = {task->device.index, task->smem_bytes, task->stream, task->programmatic_launch};
    void *arguments[] = {static_cast<void *>(&args)...};
    return launch_kernel(reinterpret_cast<const void *>(kernel), Prepared<kernel>::on, how, grid, arguments, error);
}

/* device.cu: GPUs, their memory and their streams, without kernels (but for one that tells how this file was built). */
#include <cuda_runtime.h>

#include <cstdio>

#include "cuda/arch/launch.cuh"
#include "cuda/cuda.h"

#ifndef MV_CUDA_ARCHS
#define MV_CUDA_ARCHS ""
#endif

namespace {

/* Its attributes say for which architecture the driver took this binary's generic code; its launch, what any costs. */
__global__ void probe_kernel() {}

/* What was asked of the driver, once per device. Races only ask twice. */
struct KnownGpu {
    mv_gpu gpu;
    bool known;
};
KnownGpu known_gpus[kMaxDevices];

mv_status driver_problem(mv_error *error, int32_t device, cudaError_t status) {
    cudaGetLastError();
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (status == cudaErrorInsufficientDriver && driver == 0)
        return mv_fail(error, MV_DEVICE_ERROR, "no NVIDIA driver was found on this machine");
    if (status == cudaErrorInsufficientDriver)
        return mv_fail(error, MV_DEVICE_ERROR,
                       "the NVIDIA driver is too old: it supports CUDA %d.%d, this build of minivllm needs %d.%d or "
                       "newer; update the driver",
                       driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    if (status == cudaErrorNoDevice)
        return mv_fail(error, MV_DEVICE_ERROR, "the NVIDIA driver finds no GPU (is CUDA_VISIBLE_DEVICES empty?)");
    int count = 0;
    if (status == cudaErrorInvalidDevice && cudaGetDeviceCount(&count) == cudaSuccess)
        return mv_fail(error, MV_DEVICE_ERROR, "cuda:%d does not exist: this machine has %d GPU%s", (int)device, count,
                       count == 1 ? "" : "s");
    return cuda_failed(error, "CUDA", status);
}

cudaError_t attribute(int32_t *value, cudaDeviceAttr which, int32_t device) {
    return cudaDeviceGetAttribute(value, which, device);
}

/* Asks the driver; with the capture check lifted, because it may have to load code. */
mv_status ask_gpu(int32_t device, mv_gpu *gpu, mv_error *error) {
    int32_t major = 0, minor = 0;
    cudaError_t status = attribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (status == cudaSuccess) status = attribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (status == cudaSuccess) status = attribute(&gpu->sm_count, cudaDevAttrMultiProcessorCount, device);
    if (status == cudaSuccess) status = attribute(&gpu->smem_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status == cudaSuccess) status = attribute(&gpu->l2_bytes, cudaDevAttrL2CacheSize, device);
    int32_t khz = 0, bits = 0; /* of memory; it moves two bits a cycle on each wire */
    if (status == cudaSuccess) status = attribute(&khz, cudaDevAttrMemoryClockRate, device);
    if (status == cudaSuccess) status = attribute(&bits, cudaDevAttrGlobalMemoryBusWidth, device);
    gpu->memory_gbs = static_cast<int32_t>(2.0 * khz * bits / 8 / 1e6);
    if (status != cudaSuccess) return driver_problem(error, device, status);
    gpu->compute_capability = 10 * major + minor;

    DeviceGuard guard;
    status = guard.enter(device);
    if (status != cudaSuccess) return driver_problem(error, device, status);
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    cudaFuncAttributes attributes = {};
    status = cudaFuncGetAttributes(&attributes, probe_kernel);
    cudaThreadExchangeStreamCaptureMode(&mode);
    guard.leave();
    if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction ||
        status == cudaErrorUnsupportedPtxVersion) {
        cudaGetLastError();
        return mv_fail(error, MV_DEVICE_ERROR,
                       "no kernel for sm_%d (cuda:%d): this build of minivllm has %s; rebuild with "
                       "MINIVLLM_CUDA_ARCHS, sm_80 is the oldest supported",
                       (int)gpu->compute_capability, (int)device, MV_CUDA_ARCHS);
    }
    if (status != cudaSuccess) return driver_problem(error, device, status);
    /* PTX older than sm_90 compiled griddepcontrol to nothing: launched early, such a kernel would not wait. */
    gpu->programmatic_launch = gpu->compute_capability >= 90 && attributes.ptxVersion >= 90;
    return MV_OK;
}

} // namespace

extern "C" mv_status mv_gpu_ready(int32_t device, mv_gpu *gpu, mv_error *error) {
    KnownGpu *known = device >= 0 && device < kMaxDevices ? &known_gpus[device] : nullptr;
    if (known && __atomic_load_n(&known->known, __ATOMIC_ACQUIRE)) {
        *gpu = known->gpu;
        return MV_OK;
    }
    const mv_status status = ask_gpu(device, gpu, error);
    if (status == MV_OK && known) {
        known->gpu = *gpu;
        __atomic_store_n(&known->known, true, __ATOMIC_RELEASE);
    }
    return status;
}

extern "C" int32_t mv_cuda_current_device(void) {
    int device = 0;
    if (cudaGetDevice(&device) == cudaSuccess) return device;
    cudaGetLastError();
    return 0;
}

extern "C" const char *mv_cuda_archs(void) { return MV_CUDA_ARCHS; }

extern "C" mv_status mv_cuda_device_count(int32_t *count, mv_error *error) {
    const cudaError_t status = cudaGetDeviceCount(count);
    if (status == cudaSuccess) return MV_OK;
    *count = 0;
    return driver_problem(error, 0, status);
}

extern "C" mv_status mv_cuda_device_info(int32_t device, mv_cuda_info *info, mv_error *error) {
    *info = mv_cuda_info{};
    cudaDeviceProp properties;
    const cudaError_t status = cudaGetDeviceProperties(&properties, device);
    if (status != cudaSuccess) return driver_problem(error, device, status);
    snprintf(info->name, sizeof info->name, "%.127s", properties.name);
    info->compute_capability = 10 * properties.major + properties.minor;
    info->sm_count = properties.multiProcessorCount;
    info->total_memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
    info->l2_bytes = properties.l2CacheSize;
    cudaDriverGetVersion(&info->driver_version);
    cudaRuntimeGetVersion(&info->runtime_version);
    mv_gpu gpu;
    mv_error ignored; /* `usable` says it; mv_gpu_ready() gives the sentence to who needs it */
    info->usable = mv_gpu_ready(device, &gpu, &ignored) == MV_OK;
    info->programmatic_launch = info->usable && gpu.programmatic_launch;
    return MV_OK;
}

namespace {

/* Runs one CUDA call with `device` current. */
template <typename Call> mv_status on_device(int32_t device, const char *what, mv_error *error, Call call) {
    DeviceGuard guard;
    cudaError_t status = guard.enter(device);
    if (status != cudaSuccess) return driver_problem(error, device, status);
    status = call();
    guard.leave();
    if (status == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        return mv_fail(error, MV_NO_MEMORY, "%s: cuda:%d is out of memory", what, (int)device);
    }
    return status == cudaSuccess ? MV_OK : cuda_failed(error, what, status);
}

} // namespace

extern "C" mv_status mv_cuda_malloc(int32_t device, size_t bytes, void **data, mv_error *error) {
    *data = nullptr;
    return on_device(device, "cudaMallocAsync", error,
                     [&] { return cudaMallocAsync(data, bytes ? bytes : 1, nullptr); });
}

extern "C" mv_status mv_cuda_free(int32_t device, void *data, mv_error *error) {
    return on_device(device, "cudaFreeAsync", error, [&] { return cudaFreeAsync(data, nullptr); });
}

extern "C" mv_status mv_cuda_copy(int32_t device, void *to, const void *from, size_t bytes, void *stream,
                                  mv_error *error) {
    return on_device(device, "cudaMemcpyAsync", error, [&] {
        const cudaStream_t on = static_cast<cudaStream_t>(stream);
        cudaPointerAttributes source = {}, target = {};
        cudaError_t status = cudaPointerGetAttributes(&source, from);
        if (status == cudaSuccess) status = cudaPointerGetAttributes(&target, to);
        if (status == cudaSuccess) status = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, on);
        const bool both_device = source.type == cudaMemoryTypeDevice && target.type == cudaMemoryTypeDevice;
        return status == cudaSuccess && !both_device ? cudaStreamSynchronize(on) : status;
    });
}

extern "C" mv_status mv_cuda_stream_wait(int32_t device, void *waiting, void *producing, mv_error *error) {
    return on_device(device, "cudaStreamWaitEvent", error, [&] {
        cudaEvent_t event;
        cudaError_t status = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
        if (status != cudaSuccess) return status;
        status = cudaEventRecord(event, static_cast<cudaStream_t>(producing));
        if (status == cudaSuccess) status = cudaStreamWaitEvent(static_cast<cudaStream_t>(waiting), event, 0);
        cudaEventDestroy(event);
        return status;
    });
}

extern "C" mv_status mv_cuda_synchronize(int32_t device, void *stream, mv_error *error) {
    return on_device(device, "cudaStreamSynchronize", error,
                     [&] { return cudaStreamSynchronize(static_cast<cudaStream_t>(stream)); });
}

extern "C" mv_status mv_cuda_launch_nothing(int32_t device, mv_error *error) {
    mv_gpu gpu;
    const mv_status status = mv_gpu_ready(device, &gpu, error);
    if (status != MV_OK) return status;
    const Launch how = {device, gpu.smem_bytes, nullptr, gpu.programmatic_launch};
    return launch_kernel(reinterpret_cast<const void *>(probe_kernel), Prepared<probe_kernel>::on, how, {1, 32, 0, 0},
                         nullptr, error);
}

extern "C" mv_status mv_cuda_pointer_device(const void *data, int32_t *device, mv_error *error) {
    cudaPointerAttributes attributes = {};
    const cudaError_t status = cudaPointerGetAttributes(&attributes, data);
    if (status != cudaSuccess) return driver_problem(error, 0, status);
    if (attributes.type != cudaMemoryTypeDevice && attributes.type != cudaMemoryTypeManaged)
        return mv_fail(error, MV_BAD_VALUE, "the pointer %p is not device memory", data);
    *device = attributes.device;
    return MV_OK;
}

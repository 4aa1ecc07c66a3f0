/* driver.cuh: host: functions of the driver, asked for by name, so that nothing links against libcuda. */
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

/* A function as CUDA `version` has it, or NULL where the driver is older. Races ask twice. */
static inline void *driver_function(void **found, const char *name, unsigned version) {
    void *function = __atomic_load_n(found, __ATOMIC_ACQUIRE);
    if (function) return function;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t status = cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &result);
#else
    const cudaError_t status = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &result);
#endif
    if (status != cudaSuccess || result != cudaDriverEntryPointSuccess) return nullptr;
    __atomic_store_n(found, function, __ATOMIC_RELEASE);
    return function;
}

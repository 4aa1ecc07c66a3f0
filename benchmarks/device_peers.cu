/* device_peers.cu: the two floors a GPU kernel is judged by: reading some bytes, and copying them.
 *
 * Both work in 16-byte packets, eight in flight per thread, on a grid that the caller sizes. As nodes of one graph with
 * programmatic launch, the reads of one node overlap the tail of the one before it: that is what a fused kernel whose
 * weights do not depend on the node before it can reach at best. read_floor waits for the node before it at its end,
 * as every op must before it writes. Compiled at run time into a shared library and called through ctypes.
 */
#include <cuda_runtime.h>
#include <stdint.h>

constexpr int kThreads = 512;
constexpr int kInFlight = 8;

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* Not .nc: ptxas moves such loads past griddepcontrol.wait, and then nothing overlaps. */
__device__ __forceinline__ uint4 load_once(const uint4 *p) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

/* Each block reads `each` consecutive packets. */
__global__ void __launch_bounds__(kThreads)
    read_kernel(const uint4 *data, int64_t packets, int64_t each, uint32_t *never) {
    let_next_start();
    const int64_t first = each * blockIdx.x, end = first + each, last = end < packets ? end : packets;
    uint32_t seen = 0;
#pragma unroll 1
    for (int64_t i = first + threadIdx.x; i < last; i += kInFlight * kThreads) {
        uint4 v[kInFlight] = {};
#pragma unroll
        for (int j = 0; j < kInFlight; ++j)
            if (i + j * kThreads < last) v[j] = load_once(data + i + j * kThreads);
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) seen |= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    /* Keeps the loads: the caller passes NULL, which the compiler cannot know. */
    if (never != nullptr) never[threadIdx.x] = seen;
    wait_for_previous();
}

/* Each thread copies kInFlight packets, a block's width apart. */
__global__ void __launch_bounds__(kThreads) copy_kernel(uint4 *to, const uint4 *from, int64_t packets) {
    let_next_start();
    wait_for_previous();
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kInFlight + threadIdx.x;
    uint4 v[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j)
        if (first + j * kThreads < packets) v[j] = load_once(from + first + j * kThreads);
#pragma unroll
    for (int j = 0; j < kInFlight; ++j)
        if (first + j * kThreads < packets) __stcs(to + first + j * kThreads, v[j]);
}

template <typename... Parameters, typename... Args>
static cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int programmatic, void *stream, Args... args) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(kThreads);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = programmatic ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(args)...);
}

/* Reads `bytes` (a multiple of 16) at `data` with `blocks` blocks. 0, or a cudaError_t. */
extern "C" int read_floor(const void *data, int64_t bytes, int64_t blocks, int programmatic, void *stream) {
    const int64_t packets = bytes / 16, each = (packets + blocks - 1) / blocks;
    return launch(read_kernel, blocks, programmatic, stream, static_cast<const uint4 *>(data), packets, each, nullptr);
}

/* Copies `bytes` (a multiple of 16). 0, or a cudaError_t. */
extern "C" int copy_floor(void *to, const void *from, int64_t bytes, int programmatic, void *stream) {
    const int64_t packets = bytes / 16, each = kThreads * kInFlight;
    return launch(copy_kernel, (packets + each - 1) / each, programmatic, stream, static_cast<uint4 *>(to),
                  static_cast<const uint4 *>(from), packets);
}

extern "C" const char *error_text(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

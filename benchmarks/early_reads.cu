// early_reads.cu: does a load before griddepcontrol.wait see what the work in front of the launch wrote?
//
//     early_reads SECONDS SEED     one process; `python -m benchmarks.early_reads` runs many at a time
//
// Work on one stream: a writer, then one or two calls that may begin before the work in front of them has finished
// (programmatic dependent launch). A call loads the array once before its wait and once after it. Patterns come in
// random order; the last lines say, for each, how many launches there were and how many loads of each kind were stale.
#include <cuda_runtime.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>

constexpr int kCount = 5120, kThreads = 256, kValues = 64, kBurst = 32;
constexpr double kRunSeconds = 0.2;

enum Writer { kKernel, kDeviceCopy };
enum First { kNone, kTriggersAtOnce, kTriggersAfterWait, kPlain };
const char *const kWriters[] = {"kernel", "device copy"};
const char *const kFirsts[] = {"none", "triggers at once", "triggers after its wait", "launched plainly"};

struct Stale {
    unsigned long long before, after;
};

// It never lets the next kernel begin early: that one has to wait for the end of this.
__global__ void write(unsigned *array, unsigned value) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < kCount; i += gridDim.x * blockDim.x) array[i] = value;
}

__device__ unsigned load(const unsigned *from) {
    unsigned value;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}

__global__ void call(const unsigned *array, unsigned expected, bool trigger_at_once, int cycles, Stale *stale) {
    if (trigger_at_once) asm volatile("griddepcontrol.launch_dependents;");
    unsigned before = 0, after = 0;
    for (int i = threadIdx.x; i < kCount; i += kThreads) before += load(array + i) != expected;
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if (!trigger_at_once) asm volatile("griddepcontrol.launch_dependents;");
    for (int i = threadIdx.x; i < kCount; i += kThreads) after += load(array + i) != expected;
    if (before) atomicAdd(&stale->before, before);
    if (after) atomicAdd(&stale->after, after);
    for (const long long start = clock64(); clock64() - start < cycles;) {
    }
}

int main(int argc, char **argv) {
    if (argc != 3) return fprintf(stderr, "usage: early_reads SECONDS SEED\n"), 2;
    const double seconds = atof(argv[1]);
    std::mt19937 random(atoi(argv[2]));
    int sms = 0;
    cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0);
    cudaStream_t stream;
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    unsigned *array, *sources;
    Stale *stale;
    cudaMalloc(&array, kCount * sizeof *array);
    cudaMalloc(&sources, kValues * kCount * sizeof *sources);
    cudaMalloc(&stale, 2 * sizeof *stale);
    for (int v = 0; v < kValues; v++) write<<<16, 64, 0, stream>>>(sources + v * kCount, v + 1);

    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    const auto launch = [&](unsigned expected, bool plain, bool trigger_at_once, int cycles, Stale *counts) {
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(sms);
        config.blockDim = dim3(kThreads);
        config.stream = stream;
        config.attrs = &early;
        config.numAttrs = plain ? 0 : 1;
        cudaLaunchKernelEx(&config, call, (const unsigned *)array, expected, trigger_at_once, cycles, counts);
    };
    const auto begin = std::chrono::steady_clock::now();
    const auto elapsed = [&] {
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    };

    struct {
        unsigned long long launches, runs, stale_runs;
        Stale stale[2];
    } total[2][4] = {};
    while (elapsed() < seconds) {
        const Writer writer = Writer(random() % 2);
        const First first = First(random() % 4);
        auto &sum = total[writer][first];
        unsigned value = 0;
        cudaMemsetAsync(stale, 0, 2 * sizeof *stale, stream);
        for (const double until = elapsed() + kRunSeconds; elapsed() < until;) {
            for (int i = 0; i < kBurst; i++, sum.launches++) {
                value = value % kValues + 1;
                if (writer == kKernel)
                    write<<<16, 64, 0, stream>>>(array, value);
                else
                    cudaMemcpyAsync(array, sources + (value - 1) * kCount, kCount * sizeof *array,
                                    cudaMemcpyDeviceToDevice, stream);
                if (first != kNone) launch(value, first == kPlain, first == kTriggersAtOnce, 3000, &stale[0]);
                launch(value, false, false, 0, &stale[1]);
            }
            cudaStreamSynchronize(stream);
        }
        Stale counts[2];
        cudaMemcpy(counts, stale, sizeof counts, cudaMemcpyDeviceToHost);
        for (int i = 0; i < 2; i++) {
            sum.stale[i].before += counts[i].before;
            sum.stale[i].after += counts[i].after;
        }
        sum.runs++;
        sum.stale_runs += counts[0].before + counts[1].before > 0;
    }
    for (int w = 0; w < 2; w++)
        for (int f = 0; f < 4; f++) {
            const auto &sum = total[w][f];
            printf(
                "{\"writer\": \"%s\", \"first_call\": \"%s\", \"runs\": %llu, \"launches\": %llu, \"runs_with_stale\": "
                "%llu, \"first_before\": %llu, \"first_after\": %llu, \"last_before\": %llu, \"last_after\": %llu}\n",
                kWriters[w], kFirsts[f], sum.runs, sum.launches, sum.stale_runs, sum.stale[0].before,
                sum.stale[0].after, sum.stale[1].before, sum.stale[1].after);
        }
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) fprintf(stderr, "%s\n", cudaGetErrorString(error));
    return error != cudaSuccess;
}

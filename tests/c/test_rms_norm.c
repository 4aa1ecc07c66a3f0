/* test_rms_norm.c: mv_rms_norm and mv_add_rms_norm from plain C, without Python.
 *
 * Every usable float32 kernel, on the CPU and on GPU 0 where there is one, against a double reference at hidden sizes
 * 256 ... 8192 and odd ones. Prints the largest error (limit 1e-5), and for the plain op the time per call, the bytes
 * read and written per second, and tokens per second. */
#define _POSIX_C_SOURCE 199309L /* clock_gettime */
#include "mv.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { TOKENS = 256 };
static const int64_t hidden_sizes[] = {256,  512, 768, 896, 1024, 2048, 2560, 4096, 5120,
                                       8192, 1,   3,   33,  255,  1001, 4099, 8191, 12289};
static const double max_error = 1e-5, eps = 1e-6, seconds_per_case = 0.02;

static mv_error error;

static void require(mv_status status, const char *what) {
    if (status == MV_OK) return;
    fprintf(stderr, "%s: %s\n", what, error.text);
    exit(1);
}

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Four uniform values make a bell: mean 0, variance 1. The same sequence in every run. */
static float next_value(void) {
    static uint64_t state = 0x9E3779B97F4A7C15u;
    double sum = 0;
    for (int i = 0; i < 4; i++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        sum += (double)(state >> 11) * 0x1p-53 - 0.5;
    }
    return (float)(sum * sqrt(3.0));
}

static float *allocate(int64_t count) {
    float *values = malloc((size_t)count * sizeof(float));
    if (values == NULL) {
        fprintf(stderr, "no memory\n");
        exit(1);
    }
    return values;
}

static float *random_values(int64_t count, float mean, float scale) {
    float *values = allocate(count);
    for (int64_t i = 0; i < count; i++) values[i] = mean + scale * next_value();
    return values;
}

/* The tensors of one case, in host memory and, for a CUDA kernel, in device memory of the same layout. */
typedef struct {
    int64_t hidden, elements;
    float *x, *residual, *weight, *out, *residual_out;
} Tensors;

static void *to_device(const void *host, size_t bytes) {
    void *data;
    require(mv_cuda_malloc(0, bytes, &data, &error), "mv_cuda_malloc");
    require(mv_cuda_copy(0, data, host, bytes, NULL, &error), "mv_cuda_copy");
    return data;
}

static Tensors tensors_on_device(const Tensors *host) {
    const size_t bytes = (size_t)host->elements * sizeof(float), row_bytes = (size_t)host->hidden * sizeof(float);
    return (Tensors){.hidden = host->hidden,
                     .elements = host->elements,
                     .x = to_device(host->x, bytes),
                     .residual = to_device(host->residual, bytes),
                     .weight = to_device(host->weight, row_bytes),
                     .out = to_device(host->out, bytes),
                     .residual_out = to_device(host->residual_out, bytes)};
}

static void free_on_device(const Tensors *device) {
    float *const all[] = {device->x, device->residual, device->weight, device->out, device->residual_out};
    for (int i = 0; i < 5; i++) require(mv_cuda_free(0, all[i], &error), "mv_cuda_free");
}

static mv_rms_norm_args make_args(const Tensors *t, const int64_t shape[2], mv_device device, const char *kernel,
                                  bool with_residual) {
    const mv_view matrix = {.shape = shape, .ndim = 2, .dtype = MV_F32, .device = device};
    mv_rms_norm_args args = {.call.kernel = kernel, .eps = eps, .rounding = MV_ROUNDING_HF};
    args.x = args.out = matrix;
    args.x.data = t->x;
    args.out.data = t->out;
    args.weight = (mv_view){.data = t->weight, .shape = shape + 1, .ndim = 1, .dtype = MV_F32, .device = device};
    if (with_residual) {
        args.residual = args.residual_out = matrix;
        args.residual.data = t->residual;
        args.residual_out.data = t->residual_out;
    }
    return args;
}

/* The largest error of out (and of residual_out, which float32 addition must give exactly). */
static double error_of(const Tensors *t, bool with_residual) {
    double worst = 0;
    for (int64_t row = 0; row < TOKENS; row++) {
        const int64_t start = row * t->hidden;
        double sum_of_squares = 0;
        for (int64_t i = start; i < start + t->hidden; i++) {
            const double s = with_residual ? t->x[i] + t->residual[i] : t->x[i];
            sum_of_squares += s * s;
        }
        const double r = 1 / sqrt(sum_of_squares / (double)t->hidden + eps);
        for (int64_t i = start; i < start + t->hidden; i++) {
            const float s = with_residual ? t->x[i] + t->residual[i] : t->x[i];
            const double difference = fabs(t->out[i] - s * r * t->weight[i - start]);
            if (!(difference <= worst)) worst = difference; /* a NaN stays */
            if (with_residual && t->residual_out[i] != s) worst = INFINITY;
        }
    }
    return worst;
}

static void run(const mv_rms_norm_args *args, const char *what) {
    mv_plan plan;
    require((args->residual.data ? mv_add_rms_norm : mv_rms_norm)(args, &plan, &error), what);
    require(mv_run(&plan, NULL, &error), what);
}

static double seconds_per_call(const mv_rms_norm_args *args, bool cuda) {
    for (int64_t calls = 1;; calls *= 2) {
        const double start = now_s();
        for (int64_t i = 0; i < calls; i++) run(args, "mv_rms_norm");
        if (cuda) require(mv_cuda_synchronize(0, NULL, &error), "mv_cuda_synchronize");
        const double seconds = now_s() - start;
        if (seconds >= seconds_per_case) return seconds / (double)calls;
    }
}

/* Checks and times one kernel at one size; true when it is right. */
static bool check(const mv_kernel_info *kernel, bool cuda, const Tensors *host) {
    const int64_t shape[2] = {TOKENS, host->hidden};
    const size_t bytes = (size_t)host->elements * sizeof(float);
    const Tensors tensors = cuda ? tensors_on_device(host) : *host;
    const mv_device device = {.kind = cuda ? MV_CUDA : MV_CPU};
    double errors[2];
    for (int with_residual = 0; with_residual < 2; with_residual++) {
        const mv_rms_norm_args args = make_args(&tensors, shape, device, kernel->name, with_residual);
        memset(host->out, 0xff, bytes);
        memset(host->residual_out, 0xff, bytes);
        run(&args, kernel->name);
        if (cuda) {
            require(mv_cuda_copy(0, host->out, tensors.out, bytes, NULL, &error), "mv_cuda_copy");
            require(mv_cuda_copy(0, host->residual_out, tensors.residual_out, bytes, NULL, &error), "mv_cuda_copy");
        }
        errors[with_residual] = error_of(host, with_residual);
    }
    const mv_rms_norm_args args = make_args(&tensors, shape, device, kernel->name, false);
    const double seconds = seconds_per_call(&args, cuda);
    if (cuda) free_on_device(&tensors);

    const bool right = errors[0] < max_error && errors[1] < max_error;
    printf("%-16s %6lld %12.2e %12.2e %10.2f %8.1f %12.3e %s\n", kernel->name, (long long)host->hidden, errors[0],
           errors[1], seconds * 1e6, 2e-9 * (double)bytes / seconds, TOKENS / seconds, right ? "" : "WRONG");
    return right;
}

int main(void) {
    int cases = 0, wrong = 0, cuda_kernels = 0;
    int32_t gpus = 0;
    mv_kernel_info kernel;
    printf("minivllm " MV_VERSION ", float32, %d tokens, limit %.0e\n", TOKENS, max_error);
    printf("%-16s %6s %12s %12s %10s %8s %12s\n", "kernel", "hidden", "rms_norm", "add_rms_norm", "us/call", "GB/s",
           "tokens/s");
    for (size_t i = 0; i < sizeof hidden_sizes / sizeof hidden_sizes[0]; i++) {
        const int64_t hidden = hidden_sizes[i], elements = TOKENS * hidden;
        const Tensors host = {.hidden = hidden,
                              .elements = elements,
                              .x = random_values(elements, 0, 1),
                              .residual = random_values(elements, 0, 1),
                              .weight = random_values(hidden, 1, 0.1f),
                              .out = allocate(elements),
                              .residual_out = allocate(elements)};
        for (int k = 0; mv_kernel_at(k, &kernel); k++) {
            if (strcmp(kernel.op, "rms_norm") != 0 || kernel.dtype != MV_F32 || !kernel.usable) continue;
            const bool cuda = strncmp(kernel.isa, "sm", 2) == 0;
            cuda_kernels += cuda;
            cases++;
            wrong += !check(&kernel, cuda, &host);
        }
        float *const all[] = {host.x, host.residual, host.weight, host.out, host.residual_out};
        for (int t = 0; t < 5; t++) free(all[t]);
    }
    if (mv_cuda_device_count(&gpus, &error) != MV_OK) {
        printf("skipped CUDA: %s\n", error.text);
    } else if (cuda_kernels == 0) {
        printf("skipped CUDA: %d GPUs, and no kernel that is usable on one\n", (int)gpus);
    }
    printf("%d cases, %d wrong\n", cases, wrong);
    return wrong > 0 || cases == 0;
}

/* test_first_call.c: the first call of a process, made by many threads at once.
 *
 * Everything that is set up lazily (the thread pool, the choice of an instruction set, CUDA's context and modules, the
 * handle of a kernel) is set up here under a race. Every thread calls each float32 rms_norm kernel with tensors of its
 * own, straight after a barrier; all must get the same right bits. One run is one race: `make ctest` makes several. */
#define _POSIX_C_SOURCE 200809L /* pthread_barrier_t */
#include "mv.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { THREADS = 16, TOKENS = 64, HIDDEN = 1024, ELEMENTS = TOKENS * HIDDEN };
static const int64_t shape[2] = {TOKENS, HIDDEN};

static float x[ELEMENTS], weight[HIDDEN];
static pthread_barrier_t start;
static mv_kernel_info kernel;
static bool on_cuda;

typedef struct {
    float out[ELEMENTS];
    const char *failed;
    mv_error error;
} Caller;

#define TRY(call)                                                                                                      \
    if ((call) != MV_OK) return caller->failed = #call, NULL

static void *call_once(void *argument) {
    Caller *caller = argument;
    mv_error *error = &caller->error;
    void *data[3] = {x, weight, caller->out};
    const size_t bytes[3] = {sizeof x, sizeof weight, sizeof caller->out};
    pthread_barrier_wait(&start);
    for (int i = 0; on_cuda && i < 3; i++) {
        const void *host = data[i];
        TRY(mv_cuda_malloc(0, bytes[i], &data[i], error));
        TRY(mv_cuda_copy(0, data[i], host, bytes[i], NULL, error));
    }
    const mv_view matrix = {
        .data = data[0], .shape = shape, .ndim = 2, .device.kind = on_cuda ? MV_CUDA : MV_CPU, .dtype = MV_F32};
    mv_rms_norm_args args = {.call.kernel = kernel.name, .x = matrix, .weight = matrix, .out = matrix, .eps = 1e-6};
    args.weight.data = data[1];
    args.weight.shape = shape + 1;
    args.weight.ndim = 1;
    args.out.data = data[2];
    mv_plan plan;
    TRY(mv_rms_norm(&args, &plan, error));
    TRY(mv_run(&plan, NULL, error));
    if (on_cuda) {
        TRY(mv_cuda_copy(0, caller->out, data[2], sizeof caller->out, NULL, error));
        for (int i = 0; i < 3; i++) TRY(mv_cuda_free(0, data[i], error));
    }
    return NULL;
}

/* True when all threads got the same, and row 0 is right. */
static bool race(Caller *callers) {
    pthread_t threads[THREADS];
    pthread_barrier_init(&start, NULL, THREADS);
    for (int i = 0; i < THREADS; i++) {
        callers[i].failed = NULL;
        if (pthread_create(&threads[i], NULL, call_once, &callers[i]) != 0) exit(1);
    }
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    pthread_barrier_destroy(&start);

    bool right = true;
    double sum = 0;
    for (int i = 0; i < HIDDEN; i++) sum += (double)x[i] * x[i];
    const double r = 1 / sqrt(sum / HIDDEN + 1e-6);
    for (int i = 0; i < THREADS; i++) {
        if (callers[i].failed) {
            printf("%s: %s: %s\n", kernel.name, callers[i].failed, callers[i].error.text);
            return false;
        }
        right &= memcmp(callers[i].out, callers[0].out, sizeof callers[0].out) == 0;
    }
    for (int i = 0; i < HIDDEN; i++) right &= fabs(callers[0].out[i] - x[i] * r * weight[i]) < 1e-5;
    if (!right) printf("%s: wrong results\n", kernel.name);
    return right;
}

int main(void) {
    static Caller callers[THREADS];
    for (int i = 0; i < ELEMENTS; i++) x[i] = (float)((i * 7919 % 2003) - 1001) / 500.0f;
    for (int i = 0; i < HIDDEN; i++) weight[i] = 1.0f + (float)(i % 7) / 16.0f;
    int races = 0, wrong = 0;
    for (int k = 0; mv_kernel_at(k, &kernel); k++) {
        if (strcmp(kernel.op, "rms_norm") != 0 || kernel.dtype != MV_F32 || !kernel.usable) continue;
        on_cuda = strncmp(kernel.isa, "sm", 2) == 0;
        races++;
        wrong += !race(callers);
    }
    printf("first call by %d threads at once: %d kernels, %d wrong\n", THREADS, races, wrong);
    return wrong > 0 || races == 0;
}

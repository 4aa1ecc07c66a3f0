/* test_pool.c: the pool of threads under everything that may happen to it at once.
 *
 * Callers with tensors of their own, some of them with a team of threads, call every op on the CPU, while one thread
 * changes how many threads there are and another looks at what exists; then the process forks, and its child does the
 * same with a pool of its own. Each result is compared with that of the first, quiet call. Meant for ThreadSanitizer
 * (`make tsan`), and right without it.
 *
 * argv[1]: how many times every caller calls, 40 where it is absent. */
#define _POSIX_C_SOURCE 200809L
#include "mv.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { CALLERS = 4, FORKS = 3, TOKENS = 40, HIDDEN = 1024, QKV = 320, ELEMENTS = TOKENS * HIDDEN };

typedef struct {
    float out[ELEMENTS], qkv[TOKENS * QKV];
    void *workspace;
    size_t workspace_bytes;
    bool failed;
} Caller;

static const int64_t x_shape[] = {TOKENS, HIDDEN}, matrix_shape[] = {QKV, HIDDEN}, out_shape[] = {TOKENS, QKV};
static float x[ELEMENTS], weight[HIDDEN], matrix[QKV * HIDDEN];
static Caller first, callers[CALLERS];
static atomic_bool stop;
static int rounds = 40;

#define VIEW(array, sizes)                                                                                             \
    { .data = array, .shape = sizes, .ndim = sizeof sizes / sizeof sizes[0], .dtype = MV_F32 }

static bool run(Caller *caller, mv_plan *plan) {
    mv_error error;
    if (plan->workspace_bytes > caller->workspace_bytes) {
        free(caller->workspace);
        caller->workspace_bytes = (plan->workspace_bytes + 255) / 256 * 256;
        caller->workspace = aligned_alloc(256, caller->workspace_bytes);
    }
    return mv_run(plan, &(mv_memory){.workspace = caller->workspace}, &error) == MV_OK;
}

static bool call_ops(Caller *caller) {
    static const int64_t weight_shape[] = {HIDDEN};
    mv_plan plan;
    mv_error error;
    const mv_rms_norm_args norm = {
        .x = VIEW(x, x_shape), .weight = VIEW(weight, weight_shape), .out = VIEW(caller->out, x_shape), .eps = 1e-6};
    const mv_rms_norm_qkv_args projection = {.x = VIEW(x, x_shape),
                                             .norm_weight = VIEW(weight, weight_shape),
                                             .qkv_weight = {VIEW(matrix, matrix_shape)},
                                             .out = VIEW(caller->qkv, out_shape),
                                             .num_heads = 3,
                                             .num_kv_heads = 1,
                                             .eps = 1e-6};
    return mv_rms_norm(&norm, &plan, &error) == MV_OK && run(caller, &plan) &&
           mv_rms_norm_qkv(&projection, &plan, &error) == MV_OK && run(caller, &plan);
}

/* A team as a framework's OpenMP has one, but of threads that are new each time. */
typedef struct {
    void (*fn)(void *);
    void *argument;
    int number;
} Member;

static _Thread_local int number;
static int number_of_member(void) { return number; }
static int members(void) { return 3; }

static void *join_team(void *argument) {
    const Member *member = argument;
    number = member->number;
    member->fn(member->argument);
    return NULL;
}

static void run_team(void (*fn)(void *), void *argument, unsigned count, unsigned zero) {
    pthread_t threads[8];
    Member team[8];
    if (zero != 0 || count < 1 || count > 8) abort();
    for (unsigned i = 1; i < count; i++) {
        team[i] = (Member){fn, argument, (int)i};
        if (pthread_create(&threads[i], NULL, join_team, &team[i]) != 0) exit(1);
    }
    fn(argument);
    for (unsigned i = 1; i < count; i++) pthread_join(threads[i], NULL);
}

static const mv_team own_team = {run_team, number_of_member, members};

/* Every other caller brings a team, in every other round. */
static void *keep_calling(void *argument) {
    Caller *caller = argument;
    for (int round = 0; round < rounds && !caller->failed; round++) {
        mv_use_team((caller - callers) % 2 && round % 2 ? &own_team : NULL);
        caller->failed = !call_ops(caller) || memcmp(caller->out, first.out, sizeof first.out) != 0 ||
                         memcmp(caller->qkv, first.qkv, sizeof first.qkv) != 0;
    }
    return NULL;
}

static void *keep_changing(void *unused) {
    for (int i = 0; !atomic_load(&stop); i++) {
        mv_kernel_info info;
        mv_set_num_threads(i % 5);
        mv_kernel_at(i % 8, &info);
        if (mv_get_num_threads() < 1) abort();
    }
    return unused;
}

/* True when all callers got what the first call did. */
static bool all_at_once(void) {
    pthread_t threads[CALLERS], changing;
    bool right = true;
    atomic_store(&stop, false);
    if (pthread_create(&changing, NULL, keep_changing, NULL) != 0) exit(1);
    for (int i = 0; i < CALLERS; i++)
        if (pthread_create(&threads[i], NULL, keep_calling, &callers[i]) != 0) exit(1);
    for (int i = 0; i < CALLERS; i++) {
        pthread_join(threads[i], NULL);
        right = right && !callers[i].failed;
    }
    atomic_store(&stop, true);
    pthread_join(changing, NULL);
    mv_set_num_threads(0);
    return right;
}

/* ThreadSanitizer ends a child of fork that starts threads whose ids the parent's had: there it computes alone. */
static bool in_a_child(void) {
#ifdef __SANITIZE_THREAD__
    mv_set_num_threads(1);
    return call_ops(&first);
#else
    return all_at_once();
#endif
}

int main(int argc, char **argv) {
    if (argc > 1) rounds = atoi(argv[1]);
    for (int i = 0; i < ELEMENTS; i++) x[i] = (float)((i * 7919 % 2003) - 1001) / 500.0f;
    for (int i = 0; i < HIDDEN; i++) weight[i] = 1.0f + (float)(i % 7) / 16.0f;
    for (int i = 0; i < QKV * HIDDEN; i++) matrix[i] = (float)(i % 11 - 5) / 64;
    mv_set_num_threads(3);
    int failures = !call_ops(&first) + !all_at_once();
    for (int i = 0; i < FORKS; i++) {
        const pid_t child = fork();
        if (child == 0) {
            alarm(60);
            _exit(in_a_child() ? 0 : 1);
        }
        int status = 0;
        failures += child < 0 || waitpid(child, &status, 0) != child || status != 0;
        failures += !call_ops(&first);
    }
    printf("the pool, with %d callers and %d forks: %d failures\n", CALLERS, FORKS, failures);
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}

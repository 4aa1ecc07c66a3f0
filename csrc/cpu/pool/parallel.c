/* parallel.c: a small pool of threads.
 *
 * One job at a time. Its indices are cut into chunks, up to four to a thread; every thread owns neighbouring chunks,
 * works through its own first, so that the same thread meets the same weights at every call, and then takes what the
 * others have not begun. The caller works too, and waits only for threads that have joined: one that wakes late, or
 * is kept off its core, costs nothing but its help. A caller that finds the pool busy, or is itself inside a job,
 * computes alone. A job is computed in its caller's floating-point mode, whichever thread takes a chunk of it.
 *
 * After a job the threads spin for some tens of microseconds, because the next op of a layer comes at once, and then
 * sleep on a condition variable. They start at the first job that wants them and are detached: nothing has to be torn
 * down at exit. A child of fork has none of them; it finds a fresh pool and starts its own.
 *
 * Why not OpenMP: libgomp would be a dependency at run time, and hangs in a forked child. But where the caller brings
 * an OpenMP team with it (mv_use_team), its threads take the chunks: they may still be spinning behind a job of their
 * own library, on the cores that threads of ours would need.
 */
#define _GNU_SOURCE
#include "cpu/pool/parallel.h"
#include "cpu/cpu.h"
#include "cpu/pool/float_mode.h"
#include "mv.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum {
    MAX_THREADS = MV_MAX_THREADS,
    CHUNKS_PER_THREAD = 4,
    SPIN_NS = 50000, /* about what Python spends between two ops; a wakeup costs the same */
    CACHE_LINE = 64
};

typedef struct {
    _Alignas(CACHE_LINE) atomic_int taken; /* of the owner's chunks; runs past their number when all are gone */
} claim;

static struct {
    pthread_mutex_t caller; /* held by the one caller whose job it is */
    pthread_mutex_t lock;   /* guards everything below but the atomics */
    pthread_cond_t work, done;
    atomic_uint generation; /* counts the jobs */
    atomic_int joined;      /* threads inside the job, the caller aside */
    bool open;              /* the job still takes threads */
    int sleepers, started;

    void (*fn)(void *context, int64_t begin, int64_t end);
    void *context;
    float_mode mode;      /* the caller's */
    int64_t count, chunk; /* chunk: indices in each */
    int chunks_each;      /* that a thread owns     */
    int threads;          /* that own chunks        */
    claim claims[MAX_THREADS];
} pool = {
    .caller = PTHREAD_MUTEX_INITIALIZER,
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .work = PTHREAD_COND_INITIALIZER,
    .done = PTHREAD_COND_INITIALIZER,
};

static _Thread_local bool inside_job;
static _Thread_local const mv_team *callers_team;
static bool is_child;             /* of a fork: teams have lost their threads, and may not know it */
static atomic_int wanted_threads; /* 0: the default */
static int default_threads;
static pthread_key_t scratch_key; /* frees a thread's scratch when it ends */
static pthread_once_t prepared = PTHREAD_ONCE_INIT;

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* ---- how many -------------------------------------------------------------------------------------------------- */

static int allowed_cores(void) {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    const long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online < 1 ? 1 : (int)online;
}

/* A forked child has the memory of the pool, but not its threads, and a lock in it may be held by one of them. */
static void forget_pool(void) {
    pthread_mutex_init(&pool.caller, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.work, NULL);
    pthread_cond_init(&pool.done, NULL);
    atomic_store(&pool.joined, 0);
    pool.open = false;
    pool.sleepers = pool.started = 0;
    inside_job = false;
    is_child = true;
}

/* When this library is loaded: the first job may be in a child whose parent's team has already worked. */
__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, forget_pool); }

static void prepare(void) {
    const char *limit_text = getenv("OMP_NUM_THREADS");
    const long limit = limit_text ? strtol(limit_text, NULL, 10) : 0; /* of a list "4,2" the outermost level */
    default_threads = allowed_cores();
    if (limit >= 1 && limit < default_threads) default_threads = (int)limit;
    if (default_threads > MAX_THREADS) default_threads = MAX_THREADS;
    pthread_key_create(&scratch_key, free);
}

void mv_set_num_threads(int n) { atomic_store(&wanted_threads, n < 1 ? 0 : n < MAX_THREADS ? n : MAX_THREADS); }

int mv_get_num_threads(void) {
    pthread_once(&prepared, prepare);
    const int wanted = atomic_load(&wanted_threads);
    return wanted ? wanted : default_threads;
}

void mv_use_team(const mv_team *team) { callers_team = team; }

bool mv_is_long_on_cpu(int64_t tokens, int64_t hidden, int64_t outputs) {
    /* One core moves a few numbers of a row and some ten products a nanosecond. */
    const double elements = (double)tokens * (double)hidden;
    return elements / 2 + elements * (double)outputs / 10 > 20e3;
}

/* ---- working --------------------------------------------------------------------------------------------------- */

/* Runs chunks until none is left: those that `me` owns, then the others'. */
static void work_on_job(int me) {
    for (int i = 0; i < pool.threads; i++) {
        const int owner = (me + i) % pool.threads;
        for (;;) {
            const int mine = atomic_fetch_add_explicit(&pool.claims[owner].taken, 1, memory_order_relaxed);
            const int64_t begin = ((int64_t)owner * pool.chunks_each + mine) * pool.chunk;
            if (mine >= pool.chunks_each || begin >= pool.count) break;
            const int64_t rest = pool.count - begin;
            pool.fn(pool.context, begin, begin + (rest < pool.chunk ? rest : pool.chunk));
        }
    }
}

/* Spins until the generation is no longer `seen`, for a while. */
static void spin_for_work(unsigned seen) {
    const int64_t deadline = now_ns() + SPIN_NS;
    do
        for (int i = 0; i < 64; i++) {
            if (atomic_load_explicit(&pool.generation, memory_order_relaxed) != seen) return;
            pause_briefly();
        }
    while (now_ns() < deadline);
}

static void *serve(void *index) {
    const int me = (int)(intptr_t)index;
    unsigned seen = 0;
    inside_job = true;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (atomic_load_explicit(&pool.generation, memory_order_relaxed) == seen) {
            pool.sleepers++;
            pthread_cond_wait(&pool.work, &pool.lock);
            pool.sleepers--;
        }
        seen = atomic_load_explicit(&pool.generation, memory_order_relaxed);
        const bool joins = pool.open && me < pool.threads;
        if (joins) atomic_fetch_add(&pool.joined, 1);
        pthread_mutex_unlock(&pool.lock);
        if (joins) {
            set_float_mode(pool.mode);
            work_on_job(me);
        }
        if (joins && atomic_fetch_sub(&pool.joined, 1) == 1) {
            pthread_mutex_lock(&pool.lock); /* so that the caller is not between its look and its sleep */
            pthread_cond_signal(&pool.done);
            pthread_mutex_unlock(&pool.lock);
        }
        spin_for_work(seen);
        pthread_mutex_lock(&pool.lock);
    }
    return NULL;
}

/* Signals are the business of the threads that were there before. A thread the system refuses is done without. */
static void start_threads(int count) {
    if (pool.started >= count - 1) return;
    sigset_t all, before;
    pthread_attr_t detached;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    while (pool.started < count - 1) {
        pthread_t thread;
        if (pthread_create(&thread, &detached, serve, (void *)(intptr_t)(pool.started + 1)) != 0) break;
        pool.started++;
    }
    pthread_attr_destroy(&detached);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void wait_for_joined(void) {
    for (int i = 0; i < 4096; i++) {
        if (atomic_load(&pool.joined) == 0) return;
        pause_briefly();
    }
    pthread_mutex_lock(&pool.lock);
    while (atomic_load(&pool.joined) != 0) pthread_cond_wait(&pool.done, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
}

static int threads_for(const mv_team *team) {
    if (!team || atomic_load(&wanted_threads)) return mv_get_num_threads();
    const int threads = team->size();
    return threads < 1 ? 1 : threads < MAX_THREADS ? threads : MAX_THREADS;
}

/* One of a team, which has a floating-point mode of its own and may be inside a job of its caller. */
static void work_in_team(void *team) {
    const int me = ((const mv_team *)team)->number();
    const float_mode before = get_float_mode();
    const bool was_inside = inside_job;
    inside_job = true;
    set_float_mode(pool.mode);
    work_on_job(me % pool.threads);
    set_float_mode(before);
    inside_job = was_inside;
}

void mv_parallel_for(int64_t count, int64_t grain, void (*fn)(void *context, int64_t begin, int64_t end),
                     void *context) {
    if (count <= 0) return;
    const mv_team *const team = is_child ? NULL : callers_team;
    const int allowed = count <= grain || inside_job ? 1 : threads_for(team);
    if (allowed == 1 || pthread_mutex_trylock(&pool.caller) != 0) {
        fn(context, 0, count);
        return;
    }

    const int64_t grains = (count + grain - 1) / grain;
    const int64_t grains_each = (grains + allowed - 1) / allowed;
    const int chunks_each = grains_each < CHUNKS_PER_THREAD ? (int)grains_each : CHUNKS_PER_THREAD;
    const int64_t chunks = (int64_t)allowed * chunks_each;
    pthread_mutex_lock(&pool.lock);
    if (!team) start_threads(allowed);
    pool.fn = fn;
    pool.context = context;
    pool.mode = get_float_mode();
    pool.count = count;
    pool.chunk = (grains + chunks - 1) / chunks * grain;
    pool.chunks_each = chunks_each;
    const int64_t owned = pool.chunk * chunks_each;
    pool.threads = (int)((count + owned - 1) / owned);
    for (int i = 0; i < pool.threads; i++) atomic_store_explicit(&pool.claims[i].taken, 0, memory_order_relaxed);
    if (team) {
        pthread_mutex_unlock(&pool.lock);
        team->run(work_in_team, (void *)(uintptr_t)team, (unsigned)allowed, 0);
        pthread_mutex_unlock(&pool.caller);
        return;
    }
    pool.open = true;
    atomic_fetch_add(&pool.generation, 1);
    if (pool.sleepers > 0) pthread_cond_broadcast(&pool.work);
    pthread_mutex_unlock(&pool.lock);

    inside_job = true;
    work_on_job(0);
    inside_job = false;

    pthread_mutex_lock(&pool.lock);
    pool.open = false;
    pthread_mutex_unlock(&pool.lock);
    wait_for_joined();
    pthread_mutex_unlock(&pool.caller);
}

/* ---- scratch --------------------------------------------------------------------------------------------------- */

void *mv_thread_scratch(size_t bytes) {
    static _Thread_local struct {
        void *data;
        size_t bytes;
    } mine;
    if (mine.bytes >= bytes) return mine.data;
    pthread_once(&prepared, prepare);
    free(mine.data);
    mine.bytes = (bytes + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
    mine.data = aligned_alloc(CACHE_LINE, mine.bytes);
    if (!mine.data) mine.bytes = 0;
    pthread_setspecific(scratch_key, mine.data);
    return mine.data;
}

/* test_float_mode.c: the threads of the pool compute in the floating-point mode of their caller.
 *
 * Equal rows of subnormal numbers, and of ordinary ones, are shared out among threads that began in another mode: no
 * row may differ from the first. Every float32 kernel of rms_norm of the CPU, flushing subnormal numbers to zero and
 * not, and rounding upward and downward. */
#include "mv.h"

#include <fenv.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

enum { TOKENS = 2048, HIDDEN = 256, CALLS = 10 };
static const int64_t shape[] = {TOKENS, HIDDEN};
static float x[TOKENS * HIDDEN], out[TOKENS * HIDDEN];
static int failures;

static void expect(bool holds, const mv_kernel_info *kernel, const char *what) {
    if (holds) return;
    printf("FAILED: %s: %s\n", kernel->name, what);
    failures++;
}

/* False where this test does not know how. */
static bool flush_subnormal_numbers(bool flush) {
#if defined(__x86_64__)
    const unsigned bits = 0x8040; /* results, operands */
    _mm_setcsr(flush ? _mm_getcsr() | bits : _mm_getcsr() & ~bits);
    return true;
#elif defined(__aarch64__)
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    mode = flush ? mode | 1u << 24 : mode & ~((uint64_t)1 << 24);
    __asm__ volatile("msr fpcr, %0" : : "r"(mode));
    return true;
#else
    (void)flush;
    return false;
#endif
}

/* The first element of out, which all rows must have alike. */
static float first_of_equal_rows(const mv_kernel_info *kernel, float value, const char *what) {
    const mv_view view = {.shape = shape, .ndim = 2, .dtype = MV_F32};
    mv_rms_norm_args args = {.call.kernel = kernel->name, .x = view, .out = view, .eps = 1e-6};
    mv_plan plan;
    mv_error error;
    args.x.data = x;
    args.out.data = out;
    for (int i = 0; i < TOKENS * HIDDEN; i++) x[i] = value * (float)(1 + i % HIDDEN % 7);
    for (int call = 0; call < CALLS; call++) {
        memset(out, 0xff, sizeof out);
        if (mv_rms_norm(&args, &plan, &error) != MV_OK || mv_run(&plan, NULL, &error) != MV_OK) {
            expect(false, kernel, error.text);
            return 0;
        }
        bool equal = true;
        for (int row = 1; row < TOKENS; row++)
            equal = equal && memcmp(out, out + row * HIDDEN, HIDDEN * sizeof *out) == 0;
        expect(equal, kernel, what);
    }
    return out[0];
}

static void test_kernel(const mv_kernel_info *kernel) {
    static const bool flushes[] = {false, true, false};
    for (int i = 0; i < 3; i++) {
        if (!flush_subnormal_numbers(flushes[i])) break;
        const float first = first_of_equal_rows(kernel, 1e-39f, "rows of subnormal numbers differ");
        flush_subnormal_numbers(false);
        expect((first == 0) == flushes[i], kernel, "subnormal numbers are zero in the wrong mode");
    }
    float firsts[2];
    for (int up = 0; up < 2; up++) {
        fesetround(up ? FE_UPWARD : FE_DOWNWARD);
        firsts[up] = first_of_equal_rows(kernel, 0.3f, "rows are rounded differently");
        fesetround(FE_TONEAREST);
    }
    expect(firsts[0] != firsts[1], kernel, "upward and downward are the same");
}

int main(void) {
    mv_kernel_info kernel;
    int kernels = 0;
    mv_set_num_threads(4);
    for (int k = 0; mv_kernel_at(k, &kernel); k++) {
        if (strcmp(kernel.op, "rms_norm") != 0 || kernel.dtype != MV_F32 || !kernel.usable) continue;
        if (strncmp(kernel.isa, "sm", 2) == 0) continue;
        test_kernel(&kernel);
        kernels++;
    }
    printf("floating-point modes of threads: %d kernels, %d failures\n", kernels, failures);
    return failures || kernels == 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}

/* test_kernels.c: every kernel of the CPU that can run here, of every op, against float64, without Python.
 *
 * Small and odd sizes, all dtypes, both roundings, weights in every order, and tensors that end at a page that cannot
 * be touched. An op without a check does not compile here. What a call may refuse, GPUs, and larger sizes are for the
 * tests in Python. */
#define _DEFAULT_SOURCE /* MAP_ANONYMOUS */
#include "check_greedy.h"
#include "check_heads.h"
#include "check_linear.h"
#include "check_norms.h"

#define CHECK_OF(name, args) {#name, check_##name},

static const struct {
    const char *op;
    void (*check)(const mv_kernel_info *kernel);
} checks[] = {MV_OPS(CHECK_OF)};

/* argv: parts of names of ops or kernels; one of them has to be in a name. */
static bool is_wanted(const mv_kernel_info *kernel, int argc, char **argv) {
    bool wanted = argc < 2;
    for (int i = 1; i < argc; i++) wanted = wanted || strstr(kernel->op, argv[i]) || strstr(kernel->name, argv[i]);
    return wanted;
}

int main(int argc, char **argv) {
    mv_kernel_info kernel;
    int kernels = 0;
    mv_set_num_threads(3);
    for (int k = 0; mv_kernel_at(k, &kernel); k++) {
        if (strncmp(kernel.isa, "sm", 2) == 0 || !is_wanted(&kernel, argc, argv)) continue;
        if (!kernel.usable) {
            printf("skipped %s %s: %s\n", kernel.op, kernel.name, kernel.why_not);
            continue;
        }
        const int64_t compared_before = compared, failures_before = failures;
        worst = 0;
        for (size_t i = 0; i < sizeof checks / sizeof checks[0]; i++)
            if (strcmp(kernel.op, checks[i].op) == 0) checks[i].check(&kernel);
        printf("%-17s %-24s %8lld results, %lld wrong, off by %2.0f %% of what is allowed\n", kernel.op, kernel.name,
               (long long)(compared - compared_before), (long long)(failures - failures_before), 100 * worst);
        if (compared == compared_before) fail(&kernel, "nothing was compared");
        kernels++;
    }
    printf("%d kernels, %lld results, %lld wrong\n", kernels, (long long)compared, (long long)failures);
    return failures || kernels == 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}
